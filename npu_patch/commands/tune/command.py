"""tune: by op and shape, measures what there is on the device (the operator, other implementations, the original) and
writes the fastest that is right to a file that `apply()` reads.

What is not within the bars of `verify` is refused, however fast. The original stays unless another way is clearly
faster, timed as it will be called: three quarters of its samples below three quarters of the original's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from npu_patch import devices
from npu_patch.applying import api as lifecycle
from npu_patch.applying.patched_site import PatchedSite
from npu_patch.applying.state import patched_sites
from npu_patch.commands.bench.command import prepared, recorded_step
from npu_patch.commands.console.output_file import output_file
from npu_patch.commands.console.result import CommandError, Result, named
from npu_patch.commands.console.terminal import Steps, steps, table
from npu_patch.commands.replay.bars import why_not
from npu_patch.commands.replay.recording import Call, function_of, run_in_float64, run_original, timed_forms
from npu_patch.commands.subject.models import DTYPES
from npu_patch.commands.verify.command import compared
from npu_patch.measuring.in_turns import Timing, in_turns
from npu_patch.measuring.tuning import ORIGINAL, Decided, Decision, Forced, agreed, signature_for_json, write
from npu_patch.patches import CATALOGUE
from npu_patch.reporting.rows import short_name
from npu_patch.serving.dispatch import AnyDispatch
from npu_patch.serving.implementation import AnyImplementation
from npu_patch.serving.signature import Signature
from npu_patch.switches import TUNE, resolve

DECLINES = "does not take it: "
FEWEST = 5  # samples that have quartiles


@dataclass(frozen=True)
class Tuned:
    site: str
    shapes: str
    decision: Decision


def run(options: argparse.Namespace) -> Result:
    output_file("--output", options.output)
    if (tune := resolve().tune) is not None:
        raise CommandError(f"{TUNE}={tune!r} is set: unset it, so that nothing is tuned before it is measured")
    if options.samples < FEWEST:
        raise CommandError(f"--samples {options.samples}: accepted are numbers from {FEWEST}, which have quartiles")
    device, model, batch = prepared(options)
    if devices.is_simulated(device.type):
        note = "simulated NPU: its times mean nothing; this file is of no use on a real one, where it is refused"
    else:
        note = None
    with steps("measuring", options.json) as progress:
        found, left = _tune(model, batch, device, options, progress)
    write(options.output, device.type, [each.decision for each in found])
    content = {
        "model": options.model,
        "device": devices.described(device.type),
        "chip": devices.chip(device),
        "file": str(options.output),
        "note": note,
        "not_tuned": left,
        "decisions": [
            {"shapes": each.shapes, **vars(each.decision), "signature": signature_for_json(each.decision.signature)}
            for each in found
        ],
    }
    return Result(content, lambda: _shown(content, found), fine=not any(each.decision.refused for each in found))


def _tune(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    device: torch.device,
    options: argparse.Namespace,
    progress: Steps,
) -> tuple[list[Tuned], list[str]]:
    found: list[Tuned] = []
    left: list[str] = []
    tunable = {patch.name for patch in CATALOGUE if patch.tunable}
    with lifecycle.applied(model, device=device.type, triton=False) as report:  # they are alternatives like others
        sites = patched_sites(report)
        recording = recorded_step(model, batch, device, sites)
        pairs = []
        for held in sites:
            dispatch = held.replacement.dispatch
            if held.outcome.patch in tunable and dispatch is not None and function_of(held) is not None:
                pairs += [(held, dispatch, call) for call in recording.of(held)]
            else:
                left.append(f"{held.outcome.patch} {short_name(held.outcome.site)}: chooses by itself at every call")
        progress.of(len(pairs))
        for held, dispatch, call in pairs:
            ways = alternatives(dispatch, device.type)
            decision = decide(held, dispatch, call, ways, device, options.samples, DTYPES[options.dtype])
            if decision is not None:
                found.append(Tuned(short_name(held.outcome.site), call.shapes, decision))
            progress.done()
    decided = agreed([each.decision for each in found])
    return [replace(each, decision=decision) for each, decision in zip(found, decided, strict=True)], left


def alternatives(dispatch: AnyDispatch, device_type: str) -> dict[str, AnyImplementation]:
    """By name, the site's implementation, and each other one that this machine has."""
    found = {} if dispatch.choice.chosen is None else {dispatch.choice.chosen.name: dispatch.choice.chosen}
    for each in dispatch.op.implementations:
        if each.optional and devices.is_simulated(device_type):
            continue  # in triton's interpreter: minutes for times that mean nothing
        if each.name not in found and device_type in each.device_types and each.missing() is None:
            found[each.name] = each
    return found


def decide(
    held: PatchedSite,
    dispatch: AnyDispatch,
    call: Call,
    ways: Mapping[str, AnyImplementation],
    device: torch.device,
    samples: int,
    dtype: torch.dtype,
) -> Decision | None:
    """The fastest way that is right, for this call; None for a call without a floating result."""
    original = run_original(held, call)
    if not original.tensors:
        return None
    exact = run_in_float64(held, call).tensors
    refused: dict[str, str] = {}
    declined: dict[str, str] = {}
    forms: dict[str, Callable[[], None]] = {}
    signature: Signature = ()
    try:
        for name, implementation in ways.items():
            dispatch.tuned = forced = Forced(implementation)
            wrong = why_wrong(held, call, original, exact, dtype)
            signature = next(reversed(forced), signature)  # others were declined before
            if wrong is None:
                replaced, forms[ORIGINAL] = timed_forms(held, call)
                forms[name] = _as_installed(dispatch, dict(forced), replaced)
            elif wrong.startswith(DECLINES):
                declined[name] = wrong.removeprefix(DECLINES)
            else:
                refused[name] = wrong
        forms.setdefault(ORIGINAL, lambda: None)
        times = in_turns(forms, device, samples=samples) if len(forms) > 1 else {}
    finally:
        dispatch.tuned = {}
    medians = {name: timing.median for name, timing in times.items()}
    quartiles = {name: (timing.low, timing.high) for name, timing in times.items()}
    site = held.outcome.patch, held.outcome.site, held.outcome.variant
    return Decision(*site, signature, fastest(times), medians, quartiles, refused, declined)


def _as_installed(
    dispatch: AnyDispatch, decided: Mapping[Signature, Decided], form: Callable[[], None]
) -> Callable[[], None]:
    """As `apply()` will call it under the file: the shapes of the call are looked up first."""

    def run() -> None:
        dispatch.tuned = decided
        form()

    return run


def fastest(times: Mapping[str, Timing]) -> str:
    """The one with the lowest median of those that are clearly faster than the original, or that."""
    clearly = [name for name in times if name != ORIGINAL and times[name].high < times[ORIGINAL].low]
    return min(clearly, key=lambda name: times[name].median, default=ORIGINAL)


def why_wrong(held: PatchedSite, call: Call, original: Any, exact: Mapping[str, Any], dtype: torch.dtype) -> str | None:
    """Why this replacement may not be used for this call, or None."""
    calls = held.replacement.calls
    fell_through = calls.fell_through.copy()
    try:
        errors = compared(held, call, original, exact)
    except Exception as error:
        return f"raises {named(error)}"
    passed_on = calls.fell_through - fell_through
    if passed_on:
        return f"{DECLINES}{next(iter(passed_on))}"
    return errors if isinstance(errors, str) else why_not(errors, dtype)


def _shown(content: dict[str, Any], found: list[Tuned]) -> Iterator[Any]:
    yield f"{content['model']} on {content['device']} ({content['chip']}): forward and backward, median ms"
    if content["note"]:
        yield content["note"]
    rows = [
        (
            each.decision.patch,
            each.site,
            each.shapes,
            ", ".join(f"{name} {time:.3f}" for name, time in sorted(each.decision.times.items(), key=lambda x: x[1])),
            ("green", each.decision.choice),
        )
        for each in found
    ]
    yield table("", ("patch", "site", "shapes", "times", "chosen"), rows)
    for each in found:
        for name, why in each.decision.refused.items():
            yield f"REFUSED: {name} for {each.site}, {each.shapes}: {why}"
    for each in content["not_tuned"]:
        yield f"not tuned: {each}"
    yield f"written to {content['file']}; use it with TWINKLE_NPU_TUNE={content['file']}"
