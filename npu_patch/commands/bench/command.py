"""bench: on the user's own device, each patched op at the model's shapes and a LoRA step, patched against unpatched.

Forward and backward together, in turns, medians with quartiles. On the simulated NPU a time means nothing: there,
kernel launches and bytes are counted instead.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from npu_patch import devices, simulator
from npu_patch.applying import api as lifecycle
from npu_patch.applying.patched_site import PatchedSite
from npu_patch.applying.state import patched_sites
from npu_patch.commands.bench.measured import Measured
from npu_patch.commands.console.output_file import output_file
from npu_patch.commands.console.result import CommandError, Result, named
from npu_patch.commands.console.terminal import Steps, steps, table
from npu_patch.commands.replay.recording import Recording, function_of, recorded, timed_forms
from npu_patch.commands.subject import models
from npu_patch.commands.subject.lora_step import RANK, lora_step
from npu_patch.commands.subject.models import DTYPES
from npu_patch.measuring.in_turns import Timing, in_turns, merged
from npu_patch.reporting.rows import short_name
from npu_patch.switches import resolve

SIMULATED = (
    "simulated NPU: its times mean nothing and are not shown; launches and MB moved are simulated counts, which are "
    "properties of the program"
)


def run(options: argparse.Namespace) -> Result:
    png = options.png
    if png is not None:
        output_file("--png", png, ending=".png")
        require_matplotlib()
    device, model, batch = prepared(options)
    with steps("measuring", options.json) as progress:
        measured = _ops(model, batch, device, options.samples, progress)
        measured.append(_step(model, batch, device, options.samples))
        progress.done()
    simulated = devices.is_simulated(device.type)
    content = {
        "model": options.model,
        "device": devices.described(device.type),
        "chip": devices.chip(device),
        "dtype": options.dtype,
        "tokens": batch["input_ids"].shape[1],
        "note": SIMULATED if simulated else None,
        "results": [{**asdict(each), "gain": each.gain} for each in measured],
    }
    if png is not None:
        from npu_patch.commands.bench.picture import draw

        draw(content, measured, png)
        content["picture"] = str(png)
    return Result(content, lambda: _shown(content, measured), fine=not any(each.failure for each in measured))


def prepared(options: argparse.Namespace) -> tuple[torch.device, torch.nn.Module, dict[str, torch.Tensor]]:
    """Device, model on it, batch; raises `CommandError` for numbers and names that are none."""
    for name in ("tokens", "samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise CommandError(f"--{name} {value}: accepted are numbers from 1")
    switches = resolve()
    if not switches["patch"]:
        raise CommandError(f"{switches.sources['patch']} switches everything off: there is nothing to measure")
    device = models.device_of(options)
    tiny = options.tiny or device.type == "cpu" or devices.is_simulated()
    source = models.source_of(options.model) if tiny else models.real_source_of(options.model)
    model = source.make(0, False).to(DTYPES[options.dtype]).to(device)
    length = options.tokens or min(models.positions_of(model), 64 if tiny else 4096)
    batch = models.batch_for(model, batch=1, length=length)
    models.require_it_runs(model, batch, options.model)
    return device, model, batch


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise CommandError(f"--png needs matplotlib ({error}): pip install 'npu_patch[cli]'") from error


def _ops(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], device: torch.device, samples: int, progress: Steps
) -> list[Measured]:
    found = []
    with lifecycle.applied(model, device=device.type) as report:
        sites = [held for held in patched_sites(report) if function_of(held) is not None]
        recording = recorded_step(model, batch, device, sites)
        pairs = [(held, call) for held in sites for call in recording.of(held)]
        progress.of(len(pairs) + 1)  # and the step
        for held, call in pairs:
            patched, original = timed_forms(held, call)
            what = held.outcome.patch, short_name(held.outcome.site), call.shapes
            timed = partial(in_turns, {"patched": patched, "original": original}, device, samples=samples)
            found.append(_measure(what, patched, original, device, timed))
            progress.done()
        found += [
            Measured(each.patch, short_name(each.site), "", failure=f"not patched: {each.reason}")
            for each in report.failed
        ]
    return found


def recorded_step(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], device: torch.device, sites: list[PatchedSite]
) -> Recording:
    """What the sites were called with, forward and backward; by the originals, if a replacement raises."""
    with recorded(sites) as recording:
        try:
            forward_backward(model, batch, device)
        except Exception:
            model.zero_grad(set_to_none=True)
        else:
            return recording
    with recorded(sites, originals=True, into=recording):
        forward_backward(model, batch, device)
    return recording


def _step(model: torch.nn.Module, batch: dict[str, torch.Tensor], device: torch.device, samples: int) -> Measured:
    adapted, step = lora_step(model, batch)

    def patched() -> None:
        with lifecycle.applied(adapted, device=device.type):
            step()

    what = ("step", f"LoRA, r={RANK}", _shapes(batch))
    return _measure(what, patched, step, device, partial(in_blocks, adapted, step, device, samples))


def in_blocks(
    adapted: torch.nn.Module, step: Callable[[], None], device: torch.device, samples: int
) -> dict[str, Timing]:
    """Patched and unpatched steps in turns of four: applying is no part of a step."""
    parts: dict[str, list[Timing]] = {"original": [], "patched": []}
    for _ in range(max(1, samples // 4)):
        parts["original"].append(in_turns({"": step}, device, samples=4, in_a_row=False)[""])
        with lifecycle.applied(adapted, device=device.type):
            parts["patched"].append(in_turns({"": step}, device, samples=4, in_a_row=False)[""])
    return {name: merged(timings) for name, timings in parts.items()}


def _measure(
    what: tuple[str, str, str],
    patched: Callable[[], None],
    original: Callable[[], None],
    device: torch.device,
    timed: Callable[[], dict[str, Timing]],
) -> Measured:
    try:
        if devices.is_simulated(device.type):
            launches, moved = zip(_counted(patched), _counted(original), strict=True)
            return Measured(*what, launches=launches, bytes=moved)
        timings = timed()
    except Exception as error:
        return Measured(*what, failure=f"raises {named(error)}")
    return Measured(*what, timings["patched"], timings["original"])


def _counted(form: Callable[[], None]) -> tuple[int, int]:
    form()  # whatever is made once
    with simulator.count() as counted:
        form()
    return counted.launches, counted.bytes


def forward_backward(model: torch.nn.Module, batch: dict[str, torch.Tensor], device: torch.device) -> None:
    """As in training: without a cache."""
    no_cache = {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}
    output = model(**{name: tensor.to(device) for name, tensor in batch.items()}, **no_cache)
    models.loss_of(output).backward()
    model.zero_grad(set_to_none=True)


def _shapes(batch: dict[str, torch.Tensor]) -> str:
    return "x".join(map(str, batch["input_ids"].shape)) + " tokens"


def _shown(content: dict[str, Any], measured: list[Measured]) -> Iterator[Any]:
    yield f"{content['model']} on {content['device']} ({content['chip']}), {content['dtype']}: forward and backward"
    if content["note"]:
        yield content["note"]
        columns = (
            *("patch", "site", "shapes"),
            *("launches", "launches unpatched", "MB", "MB unpatched", "fewer launches"),
        )
        rows: list[tuple[Any, ...]] = [
            (
                each.patch,
                each.site,
                each.shapes,
                *map(str, each.launches),
                *(f"{moved / 1e6:.2f}" for moved in each.bytes or ()),
                "" if each.gain is None else f"{each.gain:.1f} x",
            )
            for each in measured
            if each.failure is None and each.launches is not None and any(each.launches)
        ]
    else:
        columns = (
            *("patch", "site", "shapes"),
            *("ms", "ms unpatched", "peak MiB", "peak MiB unpatched", "faster"),
        )
        rows = [
            (
                each.patch,
                each.site,
                each.shapes,
                *map(_time, each.times),
                *map(_peak, each.times),
                (("green" if gain >= 1 else "red"), f"{gain:.2f} x"),
            )
            for each in measured
            if each.failure is None and (gain := each.gain) is not None
        ]
    yield table("", columns, rows, numbers=columns[3:])
    for each in measured:
        if each.failure is not None:
            yield f"FAILED: {each.patch} {each.site}, {each.shapes}: {each.failure}"
    if "picture" in content:
        yield f"drawn to {content['picture']}"


def _time(timing: Timing) -> str:
    return f"{timing.median:.3f} ({timing.low:.3f} to {timing.high:.3f})"


def _peak(timing: Timing) -> str:
    return "" if timing.peak is None else f"{timing.peak / 2**20:.1f}"
