"""Memory, streams, random numbers, saving: what torch_npu's runtime gives on the simulated NPU."""

import copy
import gc
import io
import pickle

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("simulated")


def test_memory_statistics_go_up_and_down(npu: torch.device) -> None:
    torch.ones(3, device=npu).sum()  # whatever the device sets up once
    gc.collect()
    torch.npu.empty_cache()
    before, free = torch.npu.memory_allocated(), torch.npu.mem_get_info()[0]
    torch.npu.reset_peak_memory_stats()
    block = torch.empty(1 << 24, device=npu)  # larger than what earlier tests left free within a segment
    during, free_during = torch.npu.memory_allocated(), torch.npu.mem_get_info()[0]
    del block
    torch.npu.empty_cache()
    assert 64 << 20 <= during - before < 66 << 20
    assert free_during < free
    assert torch.npu.memory_allocated() == before
    assert torch.npu.mem_get_info()[0] == free
    assert torch.npu.max_memory_allocated() == during


def test_more_memory_than_the_device_has(npu: torch.device) -> None:
    with pytest.raises(RuntimeError, match=r"[Oo]ut of memory|out of memory"):
        torch.empty(1 << 42, dtype=torch.uint8, device=npu)
    torch.ones(3, device=npu).sum().item()


def test_streams_and_events(npu: torch.device) -> None:
    stream = torch.npu.Stream()
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    with torch.npu.stream(stream):
        start.record()
        x = torch.ones(1000, device=npu) + 1
        end.record()
    torch.npu.current_stream().wait_stream(stream)
    x.record_stream(stream)
    end.synchronize()
    torch.npu.synchronize()
    assert end.query()
    assert stream.query()
    assert 0 < start.elapsed_time(end) < 10_000


def test_device_properties() -> None:
    properties = torch.npu.get_device_properties(0)
    assert (properties.name, properties.cube_core_num, properties.vector_core_num) == ("Ascend910B3", 20, 40)


def test_random_state(npu: torch.device) -> None:
    state = torch.npu.get_rng_state()
    first, second = torch.rand(5, device=npu), torch.rand(5, device=npu)
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(5, device=npu), first)
    assert not torch.equal(first, second)

    own = torch.Generator(npu).manual_seed(4)
    drawn = torch.randn(3, generator=own, device=npu)
    assert torch.equal(torch.randn(3, generator=own.manual_seed(4), device=npu), drawn)

    torch.npu.manual_seed(5)
    drawn = torch.randn(3, device=npu)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(3, device=npu), drawn)

    with torch.random.fork_rng(device_type="npu"):
        forked = torch.rand(2, device=npu)
    assert torch.equal(torch.rand(2, device=npu), forked)


def test_drawing_on_the_npu_leaves_the_cpu_generator_alone(npu: torch.device) -> None:
    before = torch.get_rng_state()
    F.dropout(torch.ones(9, device=npu))
    torch.randperm(9, device=npu)
    torch.rand(3, device=npu)
    assert torch.equal(torch.get_rng_state(), before)


def test_distributions(npu: torch.device) -> None:
    torch.manual_seed(0)
    uniform = torch.rand(10_000, device=npu)
    assert abs(uniform.mean().item() - 0.5) < 0.02
    kept = F.dropout(torch.ones(10_000, device=npu), 0.3)
    assert abs((kept != 0).float().mean().item() - 0.7) < 0.02
    assert abs(kept.max().item() - 1 / 0.7) < 1e-5
    chosen = torch.multinomial(torch.tensor([0.0, 1.0, 3.0], device=npu), 4000, replacement=True)
    assert torch.bincount(chosen, minlength=3)[0] == 0
    assert abs((chosen == 2).float().mean().item() - 0.75) < 0.04
    assert sorted(torch.randperm(9, device=npu).tolist()) == list(range(9))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_dropout(reentrant: bool, npu: torch.device) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 8)).to(npu)
    x = torch.randn(4, 8, device=npu, requires_grad=True)
    torch.manual_seed(1)
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    torch.manual_seed(1)
    checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, expected)


def test_copies_pickles_and_files(npu: torch.device, tmp_path: object) -> None:
    x = torch.randn(3, 4, device=npu)
    assert torch.equal(copy.deepcopy(x), x)
    assert torch.equal(pickle.loads(pickle.dumps(x)), x)
    buffer = io.BytesIO()
    torch.save({"x": x}, buffer)
    buffer.seek(0)
    assert torch.load(buffer)["x"].device == npu
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, map_location="cpu")["x"], x.cpu())
    safetensors.torch.save_file({"x": x}, f"{tmp_path}/x.safetensors")
    loaded = safetensors.torch.load_file(f"{tmp_path}/x.safetensors", device="npu:0")["x"]
    assert loaded.device == npu
    assert torch.equal(loaded, x)


def test_small_conveniences(npu: torch.device) -> None:
    x = torch.tensor([1.0, 2.0], device=npu)
    assert "npu:0" in repr(x)
    assert x.tolist() == [1.0, 2.0]
    assert x.cpu().numpy().tolist() == [1.0, 2.0]
    assert torch.ones(3).pin_memory().to(npu, non_blocking=True).sum().item() == 3
    assert x.to("meta").is_meta
    with torch.device(npu):
        assert (torch.ones(3) + torch.arange(3)).device == npu


def test_accelerate_device_map_and_cpu_offload(npu: torch.device) -> None:
    from accelerate import cpu_offload, dispatch_model

    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Linear(5, 3))
    x = torch.randn(2, 4)
    expected = model(x)
    placed = dispatch_model(copy.deepcopy(model), {"": "npu:0"}, force_hooks=True)
    torch.testing.assert_close(placed(x).cpu(), expected)
    offloaded = cpu_offload(copy.deepcopy(model), npu)
    torch.testing.assert_close(offloaded(x.to(npu)).cpu(), expected)
