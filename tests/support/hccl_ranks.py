"""One rank of torch_npu's ProcessGroupHCCL between simulated NPUs: every collective against what the CPU computes from
the seeds of all ranks, then every fault. Writes down what went wrong in each case, what each fault said, and counts.

python tests/support/hccl_ranks.py DIRECTORY   # with what torchrun sets
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[2])
from npu_patch import simulator

if __name__ == "__main__" and simulator.real_device() is None:
    simulator.start()

import torch
import torch.distributed as dist
from torch import Tensor

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "2"))
NPU = torch.device("npu", RANK)
# By the names that older torch has for them.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
CASES: dict[str, Callable[[], None]] = {}
FAULTS: dict[str, Callable[[Any], None]] = {}
FOLDED = {"SUM": torch.add, "PRODUCT": torch.mul, "MAX": torch.maximum, "MIN": torch.minimum}
REDUCED = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int16, torch.int32, torch.int64)
UNREDUCED = (*REDUCED, torch.bool, torch.uint8, torch.float64, torch.float8_e4m3fn, torch.complex64)


def case(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    return lambda function: CASES.setdefault(name, function)


def fault(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """Called with a group of its own."""
    return FAULTS.setdefault(function.__name__.replace("_", " "), function)


def of_rank(rank: int, length: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + rank)
    if dtype.is_floating_point:
        return (torch.randn(length, generator=generator) * 0.7 + 1.1).to(dtype)
    return torch.randint(-3, 4, (length,), generator=generator).to(dtype)


def folded(op: str, parts: list[Tensor]) -> Tensor:
    """In the order of the ranks, rounded after each step."""
    result = parts[0]
    for part in parts[1:]:
        result = FOLDED[op](result, part)
    return result


def same(found: Tensor, expected: Tensor) -> None:
    found = found.cpu()
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    whole = found.is_complex() or found.dtype == torch.float8_e4m3fn
    pair = [each.reshape(-1).view(torch.uint8) if whole else each for each in (found, expected)]
    assert torch.equal(*pair), pair


def everyone(function: Callable[[int], Any]) -> list[Any]:
    return [function(rank) for rank in range(WORLD)]


def reductions() -> None:
    def both(op: str, dtype: torch.dtype) -> None:
        expected = folded(op, everyone(lambda rank: of_rank(rank, dtype=dtype)))
        mine = of_rank(RANK, dtype=dtype).to(NPU)
        part = torch.empty(24 // WORLD, dtype=dtype, device=NPU)
        reduce_scatter_single(part, mine, getattr(dist.ReduceOp, op))
        same(part, expected.chunk(WORLD)[RANK])
        dist.all_reduce(mine, getattr(dist.ReduceOp, op))
        same(mine, expected)

    for op in FOLDED:
        for dtype in REDUCED:
            if op != "PRODUCT" or dtype not in (torch.int16, torch.bfloat16):
                CASES[f"{op} of {dtype}"] = lambda op=op, dtype=dtype: both(op, dtype)


def movements() -> None:
    def moved(dtype: torch.dtype) -> None:
        def part(seed: int) -> Tensor:
            return torch.arange(8).add(seed).remainder(5).to(dtype)

        mine = part(RANK).to(NPU)
        gathered = torch.empty(8 * WORLD, dtype=dtype, device=NPU)
        all_gather_single(gathered, mine)
        same(gathered, torch.cat(everyone(part)))
        dist.broadcast(mine, src=WORLD - 1)
        same(mine, part(WORLD - 1))
        exchanged = torch.empty_like(gathered)
        dist.all_to_all_single(exchanged, torch.cat(everyone(lambda to: part(10 * RANK + to))).to(NPU))
        same(exchanged, torch.cat(everyone(lambda by: part(10 * by + RANK))))

    for dtype in UNREDUCED:
        CASES[f"gather, broadcast and exchange of {dtype}"] = lambda dtype=dtype: moved(dtype)


reductions()
movements()


@case("every pattern of float16 and bfloat16")
def _() -> None:
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype, ops in ((torch.float16, FOLDED), (torch.bfloat16, ("SUM", "MAX", "MIN"))):
        for op in ops:
            others = [every[torch.randperm(65536, generator=generator)] for _ in range(WORLD - 1)]
            parts = [each.view(dtype) for each in (every, *others)]
            mine = parts[RANK].to(NPU)
            dist.all_reduce(mine, getattr(dist.ReduceOp, op))
            found, expected = mine.cpu(), folded(op, parts)
            equal = (found.view(torch.int16) == expected.view(torch.int16)) | (found == 0) & (expected == 0)
            assert (equal | found.isnan() & expected.isnan()).all(), (dtype, op)


@case("mean")
def _() -> None:
    mine = of_rank(RANK).to(NPU)
    dist.all_reduce(mine, dist.ReduceOp.AVG)
    torch.testing.assert_close(mine.cpu(), torch.stack(everyone(of_rank)).mean(0))


@case("lists, even and uneven")
def _() -> None:
    for length in (lambda rank: 5, lambda rank: 3 * rank + 1):
        outs = everyone(lambda rank: torch.empty(length(rank), device=NPU))  # noqa: B023
        dist.all_gather(outs, of_rank(RANK, length(RANK)).to(NPU))
        everyone(lambda rank: same(outs[rank], of_rank(rank, length(rank))))  # noqa: B023
        part = torch.empty(length(RANK), device=NPU)
        dist.reduce_scatter(part, everyone(lambda to: of_rank(100 * RANK + to, length(to)).to(NPU)))  # noqa: B023
        same(part, folded("SUM", everyone(lambda by: of_rank(100 * by + RANK, length(RANK)))))  # noqa: B023
        got = everyone(lambda by: torch.empty(length(RANK), device=NPU))  # noqa: B023
        dist.all_to_all(got, everyone(lambda to: of_rank(10 * RANK + to, length(to)).to(NPU)))  # noqa: B023
        everyone(lambda by: same(got[by], of_rank(10 * by + RANK, length(RANK))))  # noqa: B023


@case("exchange of uneven rows, some of none")
def _() -> None:
    def rows(by: int, to: int) -> int:
        return (3 * by + 5 * to) % 4

    def sent(by: int, to: int) -> Tensor:
        return torch.full((rows(by, to), 2), 10.0 * by + to)

    out = torch.empty(sum(everyone(lambda by: rows(by, RANK))), 2, device=NPU)
    mine = torch.cat(everyone(lambda to: sent(RANK, to))).to(NPU)
    dist.all_to_all_single(out, mine, everyone(lambda by: rows(by, RANK)), everyone(lambda to: rows(RANK, to)))
    same(out, torch.cat(everyone(lambda by: sent(by, RANK))))


@case("one root")
def _() -> None:
    last = WORLD - 1
    mine = of_rank(RANK).to(NPU)
    dist.reduce(mine, dst=last)
    if last == RANK:
        same(mine, folded("SUM", everyone(of_rank)))
    out = torch.empty(4, device=NPU)
    dist.scatter(out, everyone(lambda to: of_rank(to, 4).to(NPU)) if last == RANK else None, src=last)
    same(out, of_rank(RANK, 4))
    outs = everyone(lambda by: torch.empty(4, device=NPU)) if last == RANK else None
    dist.gather(of_rank(RANK, 4).to(NPU), outs, dst=last)
    assert outs is None or not everyone(lambda by: same(outs[by], of_rank(by, 4))).count(False)


@case("objects and barriers")
def _() -> None:
    found: list[Any] = [None] * WORLD
    dist.all_gather_object(found, {"rank": RANK, "x": [RANK] * (RANK + 1)})
    assert found == everyone(lambda rank: {"rank": rank, "x": [rank] * (rank + 1)})
    values = ["a", 7] if RANK == 0 else [None, None]
    dist.broadcast_object_list(values, src=0)
    assert values == ["a", 7]
    dist.barrier()
    dist.barrier(device_ids=[NPU.index])


@case("one sends, another receives")
def _() -> None:
    mine = torch.full((2 << 20,), 7.0, device=NPU)
    if RANK == 0:
        dist.send(mine, 1)
    if RANK == 1:
        got = torch.empty_like(mine)
        dist.recv(got, 0)
        same(got, mine.cpu())


@case("a ring, in one batch and one after the other")
def _() -> None:
    next_rank, previous = (RANK + 1) % WORLD, (RANK - 1) % WORLD
    mine, got = of_rank(RANK, 1 << 18).to(NPU), torch.empty(1 << 18, device=NPU)
    works = [dist.P2POp(dist.isend, mine, next_rank), dist.P2POp(dist.irecv, got, previous)]
    for work in dist.batch_isend_irecv(works if RANK % 2 else works[::-1]):
        work.wait()
    same(got, of_rank(previous, 1 << 18))
    got.zero_()
    sending = dist.isend(mine, next_rank)
    dist.irecv(got, previous).wait()
    sending.wait()
    same(got, of_rank(previous, 1 << 18))


@case("more messages than a socket holds, before any is received")
def _() -> None:
    group = dist.new_group([0, 1])
    if RANK < 2:
        outs = [torch.empty(3, device=NPU) for _ in range(1000)]
        works = [dist.isend(torch.full((3,), float(i), device=NPU), 1 - RANK, group) for i in range(1000)]
        works += [dist.irecv(out, 1 - RANK, group) for out in outs]
        for work in works:
            work.wait()
        assert torch.stack(outs)[:, 2].tolist() == list(range(1000))


@case("coalesced calls")
def _() -> None:
    from torch.distributed.distributed_c10d import _coalescing_manager

    sums = [of_rank(RANK + 10 * i).to(NPU) for i in range(3)]
    with _coalescing_manager(device=NPU, async_ops=True) as works:
        for each in sums:
            dist.all_reduce(each)
    works.wait()
    outs = [torch.empty(24 * WORLD, device=NPU) for _ in range(2)]
    with _coalescing_manager(device=NPU):
        for i, each in enumerate(outs):
            all_gather_single(each, of_rank(RANK + 10 * i).to(NPU))
    for i, each in enumerate(sums):
        same(each, folded("SUM", everyone(lambda rank: of_rank(rank + 10 * i))))  # noqa: B023
    for i, each in enumerate(outs):
        same(each, torch.cat(everyone(lambda rank: of_rank(rank + 10 * i))))  # noqa: B023


@case("not waited for at once, in another stream")
def _() -> None:
    expected = folded("SUM", everyone(of_rank))
    mine, other = of_rank(RANK).to(NPU), of_rank(RANK).to(NPU)
    work = dist.all_reduce(mine, async_op=True)
    with torch.npu.stream(torch.npu.Stream()):
        dist.all_reduce(other)
    work.wait()
    assert work.is_completed()
    work.get_future().wait()
    same(mine, expected)
    same(other, expected)


@case("groups within the world, beside gloo's")
def _() -> None:
    pairs = everyone(lambda rank: dist.new_group(sorted({rank, (rank + 1) % WORLD})))
    for rank, group in enumerate(pairs):
        members = {rank, (rank + 1) % WORLD}
        if RANK in members:
            mine = torch.full((3,), 2.0**RANK, device=NPU)
            dist.all_reduce(mine, group=group)
            same(mine, torch.full((3,), float(sum(2**member for member in members))))
    alone = everyone(lambda rank: dist.new_group([rank]))[RANK]
    mine = torch.ones(2, device=NPU)
    dist.all_reduce(mine, group=alone)
    same(mine, torch.ones(2))
    on_host = torch.ones(2)
    dist.all_reduce(on_host)
    assert on_host.tolist() == [WORLD, WORLD]


@case("meshes and sharded tensors")
def _() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("npu", (WORLD // 2, 2), mesh_dim_names=("data", "tensor"))
    whole = torch.arange(32.0).view(8, 4)
    sharded = distribute_tensor(whole.to(NPU), mesh, [Shard(0), Shard(1)])
    same(sharded.full_tensor(), whole)
    weight = distribute_tensor(torch.eye(4).to(NPU), mesh, [Replicate(), Shard(0)])
    same((sharded @ weight).full_tensor(), whole)
    again = sharded.redistribute(mesh, [Replicate(), Shard(0)]).redistribute(mesh, [Shard(1), Shard(0)])
    same(again.full_tensor(), whole)


@fault
def another_count(group: Any) -> None:
    dist.all_reduce(torch.ones(4 + RANK, device=NPU), group=group)


@fault
def another_dtype(group: Any) -> None:
    dist.all_reduce(torch.ones(4, device=NPU, dtype=torch.float32 if RANK else torch.bfloat16), group=group)


@fault
def another_op(group: Any) -> None:
    dist.all_reduce(torch.ones(4, device=NPU), dist.ReduceOp.MAX if RANK else dist.ReduceOp.SUM, group=group)


@fault
def another_call(group: Any) -> None:
    if RANK:
        dist.all_reduce(torch.ones(4, device=NPU), group=group)
    else:
        dist.broadcast(torch.ones(4, device=NPU), 0, group=group)
        dist.all_reduce(torch.ones(4, device=NPU), group=group)


@fault
def another_root(group: Any) -> None:
    dist.broadcast(torch.ones(4, device=NPU), RANK, group=group)
    dist.broadcast(torch.ones(4, device=NPU), 1 - RANK, group=group)


@fault
def other_rows(group: Any) -> None:
    x = torch.ones(4, device=NPU)
    dist.all_to_all_single(x.clone(), x, [1, 3], [2, 2] if RANK else [1, 3], group=group)


@fault
def a_second_call_after_a_failure(group: Any) -> None:
    try:
        another_count(group)
    except RuntimeError:
        another_count(group)


@fault
def a_product_of_bfloat16(group: Any) -> None:
    dist.all_reduce(torch.ones(4, device=NPU, dtype=torch.bfloat16), dist.ReduceOp.PRODUCT, group=group)


@fault
def a_sum_of_float64(group: Any) -> None:
    dist.all_reduce(torch.ones(4, device=NPU, dtype=torch.float64), group=group)


@fault
def one_device_for_both(group: Any) -> None:
    torch.npu.set_device(0)
    dist.all_reduce(torch.ones(4, device="npu:0"), group=group)


@fault
def late(group: Any) -> None:
    dist.all_reduce(torch.ones(4, device=NPU), group=group)
    os.environ["HCCL_EXEC_TIMEOUT"] = "1"
    if RANK:
        time.sleep(2)
    dist.all_reduce(torch.ones(4, device=NPU), group=group)
    dist.all_reduce(torch.ones(4, device=NPU), group=group)


@fault
def late_at_the_first_call(group: Any) -> None:
    os.environ["HCCL_CONNECT_TIMEOUT"] = "1"
    if RANK == 0:
        dist.all_reduce(torch.ones(4, device=NPU), group=group)


@fault
def dead(group: Any) -> None:
    """Its forked child, a worker of a DataLoader say, lives on."""
    dist.all_reduce(torch.ones(4, device=NPU), group=group)
    if RANK == 1:
        write_down()
        if os.fork() == 0:
            os.closerange(0, 3)
            time.sleep(4)
        os._exit(0)
    dist.all_reduce(torch.ones(4, device=NPU), group=group)


def caught(function: Callable[[], Any]) -> str | None:
    before = dict(os.environ)
    try:
        function()
    except Exception:
        return traceback.format_exc()
    finally:
        os.environ.clear()
        os.environ.update(before)
        torch.npu.set_device(NPU)
    return None


def milliseconds() -> float:
    """Processor time of a call of 1 MB, all threads."""
    mine = torch.ones(1 << 18, device=NPU)
    found = []
    for _ in range(12):
        before = time.process_time()
        dist.all_reduce(mine)
        found.append(1e3 * (time.process_time() - before))
    return sorted(found)[6]


def counts() -> dict[str, Any]:
    with simulator.count() as counted:
        dist.all_reduce(torch.ones(6, device=NPU))
        dist.all_reduce(torch.ones(6, device=NPU))
        dist.broadcast(torch.ones(6, device=NPU), 0)
        all_gather_single(torch.empty(6 * WORLD, device=NPU), torch.ones(6, device=NPU))
    return {**vars(counted), "text": str(counted)}


def write_down() -> None:
    Path(sys.argv[1], f"{RANK}.json").write_text(json.dumps(WRITTEN))


if __name__ == "__main__":
    torch.npu.set_device(NPU)
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo,npu:hccl")
    WRITTEN: dict[str, Any] = {"cases": {name: caught(function) for name, function in CASES.items()}}
    WRITTEN |= {"milliseconds": milliseconds(), "counts": counts(), "faults": {}, "seconds": {}}
    host = dist.new_group(backend="gloo")
    for name, function in FAULTS.items():
        pair = dist.new_group([0, 1])
        dist.barrier(host)
        if RANK < 2:
            begun = time.monotonic()
            WRITTEN["faults"][name] = caught(lambda: function(pair))  # noqa: B023
            WRITTEN["seconds"][name] = time.monotonic() - begun
        if name != "dead":
            dist.barrier(host)
    write_down()
    os._exit(0)  # groups that failed are not taken down
