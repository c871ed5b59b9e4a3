"""One rank of scripts/engines.py: every cell of the table, in the same order on each rank, written down."""

# ruff: noqa: E402
from __future__ import annotations

import functools
import gc
import json
import math
import os
import statistics
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist
from torch import nn

import npu_patch
from npu_patch.commands.replay.bars import FLOORS, GROSS, relative_error
from scripts.parallel import deepspeeds, plans, sequences, torchs
from scripts.parallel.case import COUNTS, Case, Engine, Step, evaluated, gradients, ids, npu, plain
from tests.support.gradients import in_float64

FOLDER = Path(sys.argv[1])
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
NEAR, ROUNDED = FLOORS[torch.float32], FLOORS[torch.bfloat16]
LUCK = 1.5  # of the roundings in one small model, as a mean over its gradients
SAID = ("engine", "family", "lora", "when", "status", "error", "reason")
started = 0


def start_groups() -> Any:
    """Anew after a failure: a communicator that failed is of no more use. On the host ranks agree what is next."""
    global started
    if dist.is_initialized():
        dist.destroy_process_group()
    started += 1
    dist.init_process_group(
        "cpu:gloo,npu:hccl",
        init_method=f"file://{FOLDER}/store{started}",
        rank=RANK,
        world_size=WORLD,
        timeout=timedelta(seconds=120),
    )
    return dist.new_group(backend="gloo")


def whole_batch(engine: Engine, model: nn.Module) -> Step:
    device = next(model.parameters()).device
    batch = ids().to(device)
    if engine.evaluates:
        return evaluated(model, batch)
    if engine.in_one_row:
        batch = batch.reshape(1, -1)
        labels = batch.roll(-1, 1)
        labels[0, -1] = batch[0, 0]
        loss = model(input_ids=batch, labels=labels, shift_labels=labels, use_cache=False).loss
    else:
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach().cpu().double().reshape(1), **gradients(model)}


@functools.cache
def reference(engine: Engine, family: str, lora: bool) -> Step:
    return whole_batch(engine, plain(family, lora, change=engine.change).to(npu()))


@functools.cache
def exact(engine: Engine, family: str, lora: bool) -> Step:
    return whole_batch(engine, in_float64(plain(family, lora, change=engine.change)))


def key(engine: Engine) -> Engine:
    """Those with the same model and batch have the same reference."""
    return Engine("", torchs.ddp, in_one_row=engine.in_one_row, evaluates=engine.evaluates, change=engine.change)


def errors_of(found: Step, expected: Step) -> dict[str, float]:
    return {
        name: relative_error(found[name].reshape(expected[name].shape), expected[name])
        if name in found and name in expected
        else math.inf
        for name in {**found, **expected}
    }


def judged(engine: Engine, case: Case, found: Step) -> tuple[float, str | None]:
    """How far the worst result is off, and why that is not equal, if it is not."""
    expected = reference(key(engine), case.family, case.lora)
    errors = errors_of(found, expected)
    far = sorted(name for name, error in errors.items() if not error < NEAR)
    worst = max(errors, key=lambda name: errors[name])
    if not far:
        return errors[worst], None
    if engine.rounds or any(math.isinf(errors[name]) for name in far):
        return errors[worst], f"of {worst}"
    truth = exact(key(engine), case.family, case.lora)
    for name in far:
        error, own = (relative_error(each[name].reshape(truth[name].shape), truth[name]) for each in (found, expected))
        if not error < GROSS * own:
            return errors[name], f"of {name}: {error:.0e} from float64, one unpatched process {own:.0e}"
    return errors[worst], None


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def tried(engine: Engine, case: Case, host: Any) -> tuple[Step | str, Any]:
    """The step, or why there is none on some rank; and the host's group, a new one in that case."""
    found: Step | str
    COUNTS.clear()
    try:
        torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = engine.run(case)
    except Exception as error:
        found = first_line(error)
        if os.environ.get("TRACEBACKS"):
            traceback.print_exc()
    finally:
        npu_patch.restore()
        gc.collect()
    everyones: list[str | None] = [None] * WORLD
    dist.all_gather_object(everyones, found if isinstance(found, str) else None, group=host)
    reasons = [reason for reason in everyones if reason is not None]
    if reasons:
        return reasons[0], start_groups()
    return found, host


def anywhere(flag: bool, host: Any) -> bool:
    flags: list[bool | None] = [None] * WORLD
    dist.all_gather_object(flags, flag, group=host)
    return any(flags)


def cell(engine: Engine, case: Case, host: Any, counted: bool) -> tuple[dict[str, Any], Any]:
    """Status "equal"; "as unpatched", where an unpatched model is as far off under this engine, or fails as well;
    "unequal"."""
    begun = time.process_time()
    found, host = tried(engine, case, host)
    counts = dict(COUNTS)
    error, reason = (math.inf, found) if isinstance(found, str) else judged(engine, case, found)
    status = "equal"
    own_counts = None
    if anywhere(reason is not None, host) or counted:
        own, host = tried(engine, Case(case.family, case.lora, "never", case.change), host)
        own_counts = dict(COUNTS)
        if reason is not None:
            status, reason = beside_unpatched(engine, case, found, own, reason)
    return {
        "engine": engine.name, "family": case.family, "lora": case.lora, "when": case.when, "status": status,
        "error": error, "reason": reason, "ran": list(case.ran()), "left": list(case.left()),
        "seconds": time.process_time() - begun, "collectives": counts, "collectives unpatched": own_counts,
    }, host  # fmt: skip


def beside_unpatched(
    engine: Engine, case: Case, found: Step | str, own: Step | str, reason: str | None
) -> tuple[str, str | None]:
    if isinstance(own, str):
        return ("as unpatched", own) if isinstance(found, str) else ("unequal", f"{reason}; unpatched: {own}")
    if isinstance(found, str):
        return "unequal", found
    expected = reference(key(engine), case.family, case.lora)
    its, others = errors_of(found, expected), errors_of(own, expected)
    if engine.rounds:
        ratios = {name: max(its[name], ROUNDED) / max(others.get(name, 0.0), ROUNDED) for name in its}
        mean, worst = statistics.geometric_mean(ratios.values()), max(ratios, key=lambda name: ratios[name])
        if mean < LUCK and ratios[worst] < GROSS:
            return "equal", f"{mean:.2f} times as far as unpatched"
        return "unequal", f"{mean:.2f} times as far as unpatched, {worst} {ratios[worst]:.2f} times"
    far = [name for name in its if not its[name] < max(NEAR, 1.1 * others.get(name, 0.0))]
    if far and reason is not None:
        return "unequal", reason
    return ("equal", None) if reason is None else ("as unpatched", reason)


def cells(asked: dict[str, Any], host: Any) -> list[dict[str, Any]]:
    found, turn = [], 0
    optional = () if deepspeeds.MISSING else deepspeeds.ENGINES
    for engine in (*torchs.ENGINES, *plans.ENGINES, *sequences.ENGINES, *optional):
        if asked["engines"] and not any(word in engine.name for word in asked["engines"]):
            continue
        for family in filter(engine.families.__contains__, asked["families"]):
            for lora in (False, True):
                if (asked["lora"] == ("no" if lora else "yes")) or (lora and not engine.adapters):
                    continue
                orders = asked["orders"]
                if asked["half"]:
                    orders = [("before", "after")[turn % 2]]
                    turn += 1
                for when in orders:
                    made, host = cell(engine, Case(family, lora, when, engine.change), host, asked["counts"])
                    found.append(made)
                    if RANK == 0:
                        said = [str(made[name]) for name in SAID]
                        print(*said, f"{made['seconds']:.1f} s", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    written = cells(json.loads((FOLDER / "asked.json").read_text()), start_groups())
    (FOLDER / f"{RANK}.json").write_text(json.dumps(written))
    os._exit(0)
