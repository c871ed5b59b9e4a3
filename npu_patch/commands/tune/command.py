"""tune: by op and shape, measures what there is on the device (the operator, other implementations, the original) and
writes the fastest that is right to a file that `apply()` reads.

What is not within the bars of `verify` is refused, however fast; in a layer in half precision, where a rounding sends
tokens to other experts, what is not within those of `auto`. The original stays unless another way is clearly
faster, timed as it will be called: three quarters of its samples below three quarters of the original's. What fuses
functions of several sites, or computes several calls at once, is timed in the layer around it, whose other parts are
timed along: it is decided only where one way is clearly faster, and goes as without the file where none is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from npu_patch import devices
from npu_patch.applying import api as lifecycle
from npu_patch.applying.choosing import tune
from npu_patch.applying.patched_site import PatchedSite
from npu_patch.applying.state import patched_sites
from npu_patch.commands.bench.command import prepared, recorded_step
from npu_patch.commands.console.output_file import output_file
from npu_patch.commands.console.result import CommandError, Result, named
from npu_patch.commands.console.terminal import Steps, steps, table
from npu_patch.commands.replay.bars import why_not
from npu_patch.commands.replay.enclosing import as_layer, layers_recorded
from npu_patch.commands.replay.recording import (
    Call,
    function_of,
    recorded,
    run_in_float64,
    run_original,
    timed_forms,
)
from npu_patch.commands.subject.lora_step import RANK, with_adapters
from npu_patch.commands.subject.models import DTYPES
from npu_patch.commands.verify.command import compared
from npu_patch.measuring.decision import DECLINES, ORIGINAL, Decision, agreed
from npu_patch.measuring.in_turns import in_turns
from npu_patch.measuring.measure import check, fastest
from npu_patch.measuring.tuning import Decided, Forced, write
from npu_patch.patches import CATALOGUE
from npu_patch.reporting.rows import short_name
from npu_patch.serving.case import Alternative, AnyCase, Measured
from npu_patch.serving.dispatch import AnyDispatch
from npu_patch.serving.implementation import AnyImplementation
from npu_patch.serving.signature import Signature
from npu_patch.sites.sites import LiveModules
from npu_patch.switches import TUNE, resolve

FEWEST = 5  # samples that have quartiles
UNDECIDED = "no way is clearly faster: goes as without the file"


@dataclass(frozen=True)
class Timed:
    """A site with one of its calls. `of_layer`: its own, or the site by calls of the layer around it. `parts`: others
    are timed along. `cases`: its op at the sizes of the model."""

    held: PatchedSite
    dispatch: AnyDispatch
    of_layer: PatchedSite
    call: Call
    parts: bool
    cases: Sequence[AnyCase]

    @property
    def site(self) -> str:
        name = short_name(self.held.outcome.site)
        return name if self.of_layer is self.held else f"{name} in {type(self.call.args[0]).__name__}"


@dataclass(frozen=True)
class Tuned:
    """`decisions`: none where no way is clearly faster."""

    timed: Timed
    measured: Mapping[str, Measured]
    decisions: Sequence[Decision]

    @property
    def what(self) -> str:
        return f"{self.timed.site}, {self.timed.call.shapes}"

    @property
    def refused(self) -> dict[str, str]:
        found = {name: each.wrong for name, each in self.measured.items() if each.wrong is not None}
        return {name: wrong for name, wrong in found.items() if not wrong.startswith(DECLINES)}


def run(options: argparse.Namespace) -> Result:
    output_file("--output", options.output)
    if (path := resolve().tune) is not None:
        raise CommandError(f"{TUNE}={path!r} is set: unset it, so that nothing is tuned before it is measured")
    if options.samples < FEWEST:
        raise CommandError(f"--samples {options.samples}: accepted are numbers from {FEWEST}, which have quartiles")
    device, model, batch = prepared(options)
    if options.lora:
        model = with_adapters(model, r=RANK, target_modules="all-linear", init_lora_weights=False).train()
    if devices.is_simulated(device.type):
        note = "simulated NPU: its times mean nothing; this file is of no use on a real one, where it is refused"
    else:
        note = None
    with steps("measuring", options.json) as progress:
        found, left = _tune(model, batch, device, options, progress)
    decisions = agreed([decision for each in found for decision in each.decisions])
    shapes_of = [each.timed.call.shapes for each in found for _ in each.decisions]
    write(options.output, device.type, decisions)
    content = {
        "model": options.model,
        "device": devices.described(device.type),
        "chip": devices.chip(device),
        "file": str(options.output),
        "note": note,
        "not_tuned": left,
        "undecided": [f"{each.what}: {UNDECIDED}" for each in found if not each.decisions],
        "refused": [f"{name} for {each.what}: {why}" for each in found for name, why in each.refused.items()],
        "decisions": [
            {"shapes": shapes, **decision.as_json()} for shapes, decision in zip(shapes_of, decisions, strict=True)
        ],
    }
    return Result(content, lambda: _shown(content, found), fine=not content["refused"])


def _tune(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    device: torch.device,
    options: argparse.Namespace,
    progress: Steps,
) -> tuple[list[Tuned], list[str]]:
    found: list[Tuned] = []
    # In triton's interpreter: minutes for times that mean nothing.
    with lifecycle.applied(model, device=device.type, triton=not devices.is_simulated(device.type)) as report:
        timed, left = _calls(model, batch, device, patched_sites(report))
        progress.of(len(timed))
        for held in {id(each.held): each.held for each in timed}.values():
            of_site = [each for each in timed if each.held is held]
            for each in of_site:
                tuned = decide(each, alternatives(each.dispatch, device.type), device, options)
                found += [] if tuned is None else [tuned]
                progress.done()
            made = [one for each in found if each.timed.held is held for one in each.decisions]
            tune(of_site[0].dispatch, agreed(made))  # what is built on it is timed with what it will be
    return found, left


def _calls(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], device: torch.device, sites: Sequence[PatchedSite]
) -> tuple[list[Timed], list[str]]:
    """What can be timed, with those last that are built on others; in words, what can not."""
    patches = {patch.name: patch for patch in CATALOGUE}
    alone: list[PatchedSite] = []
    fused: list[PatchedSite] = []
    within: list[PatchedSite] = []
    left = []
    for held in sites:
        patch, replacement = patches.get(held.outcome.patch), held.replacement
        if replacement.dispatch is None or patch is None or not patch.tunable:
            left.append(f"{held.outcome.patch} {short_name(held.outcome.site)}: chooses by itself at every call")
        elif replacement.within != ():
            within.append(held)
        elif function_of(held) is not None:
            (fused if patch.needs else alone).append(held)
    # While they are recorded, what is fused is not: else its parts would not be called.
    unfused = [*fused, *(held for held in within if patches[held.outcome.patch].needs)]
    with layers_recorded(model, within) as of_layers, recorded(unfused, originals=True) as of_fused:
        of_parts = recorded_step(model, batch, device, alone)
    found, live = [], LiveModules(model)
    for recording, some in ((of_parts, alone), (of_fused, fused), (of_layers, within)):
        for held in some:
            dispatch = held.replacement.dispatch
            assert dispatch is not None
            of_layer = as_layer(held, dispatch) if some is within else held
            calls = recording.of(held)
            cases = () if some is alone or not calls else _unlike(dispatch.cases(live))
            found += [Timed(held, dispatch, of_layer, call, some is not alone, cases) for call in calls]
    return found, left


def _unlike(cases: Iterable[AnyCase]) -> list[AnyCase]:
    return list({case.title: case for case in cases}.values())


def alternatives(dispatch: AnyDispatch, device_type: str) -> dict[str, AnyImplementation]:
    """By name, the site's implementation, and each other one that this machine has."""
    found = {} if dispatch.choice.chosen is None else {dispatch.choice.chosen.name: dispatch.choice.chosen}
    for each in dispatch.op.implementations:
        if each.optional and devices.is_simulated(device_type):
            continue
        if each.name not in found and device_type in each.device_types and each.missing() is None:
            found[each.name] = each
    return found


def decide(
    timed: Timed, ways: Mapping[str, AnyImplementation], device: torch.device, options: argparse.Namespace
) -> Tuned | None:
    """The fastest way that is right, for this call; None for a call without a floating result, or one that never
    comes to the op."""
    dispatch, of_layer, call = timed.dispatch, timed.of_layer, timed.call
    original = run_original(of_layer, call)
    if not original.tensors:
        return None
    by_cases = bool(timed.cases) and options.dtype != "float32"
    exact = {} if by_cases else run_in_float64(of_layer, call).tensors
    measured: dict[str, Measured] = {}
    forms: dict[str, Callable[[], None]] = {}
    signatures: dict[Signature, None] = {}
    try:
        for name, implementation in ways.items():
            dispatch.tuned = forced = Forced(implementation)
            wrong = why_wrong(of_layer, call, original, exact, None if by_cases else DTYPES[options.dtype])
            if by_cases and wrong is None:
                wrong = wrong_case(timed.cases, implementation, device)
            asked = list(forced)
            signatures |= dict.fromkeys(asked if timed.of_layer is not timed.held else asked[-1:])
            if wrong is None:
                replaced, forms[ORIGINAL] = timed_forms(of_layer, call)
                forms[name] = _as_installed(dispatch, dict(forced), replaced)
            else:
                measured[name] = Measured(wrong)
        times = in_turns(forms, device, samples=options.samples, peaks=False) if forms else {}
    finally:
        dispatch.tuned = {}
    if not signatures:
        return None
    measured |= {name: timing.measured() for name, timing in times.items()}
    choice = chosen(measured, in_doubt=None if timed.parts else ORIGINAL)
    outcome = timed.held.outcome
    made = [
        Decision(outcome.patch, outcome.site, outcome.variant, signature, choice, measured)
        for signature in signatures
        if choice is not None
    ]
    return Tuned(timed, measured, made)


def chosen(measured: Mapping[str, Measured], in_doubt: str | None) -> str | None:
    """The fastest, if it is clearly faster than the original; the original, if that is clearly faster than all others;
    else what it is in doubt."""
    if ORIGINAL not in measured:
        return in_doubt
    choice = fastest(measured, ORIGINAL)
    others = [each for name, each in measured.items() if name != ORIGINAL and each.wrong is None]
    if choice != ORIGINAL or all(measured[ORIGINAL].clearly_faster_than(each) for each in others):
        return choice
    return in_doubt


def _as_installed(
    dispatch: AnyDispatch, decided: Mapping[Signature, Decided], form: Callable[[], None]
) -> Callable[[], None]:
    """As `apply()` will call it under the file: the shapes of the call are looked up first."""

    def run() -> None:
        dispatch.tuned = decided
        form()

    return run


def wrong_case(cases: Sequence[AnyCase], implementation: AnyImplementation, device: torch.device) -> str | None:
    """Of its op by itself, as `apply()` checks it."""
    alternative = Alternative(implementation.name, implementation.run, implementation.unsupported)
    found = ((case, check(case, alternative, device).wrong) for case in cases)
    return next((f"{case.name}: {wrong}" for case, wrong in found if wrong is not None), None)


def why_wrong(
    held: PatchedSite, call: Call, original: Any, exact: Mapping[str, Any], dtype: torch.dtype | None
) -> str | None:
    """Why this replacement may not be used for this call, or None. `dtype`: by whose bars; None where others judge how
    near it is."""
    calls = held.replacement.calls
    fell_through = calls.fell_through.copy()
    try:
        errors = compared(held, call, original, exact)
    except Exception as error:
        return f"raises {named(error)}"
    passed_on = calls.fell_through - fell_through
    if passed_on:
        return f"{DECLINES}{next(iter(passed_on))}"
    if isinstance(errors, str):
        return errors
    return None if dtype is None else why_not(errors, dtype)


def _shown(content: dict[str, Any], found: list[Tuned]) -> Iterator[Any]:
    yield f"{content['model']} on {content['device']} ({content['chip']}): forward and backward, median ms"
    if content["note"]:
        yield content["note"]
    rows = []
    for each in found:
        timed = {name: one.seconds * 1e3 for name, one in each.measured.items() if one.seconds is not None}
        times = ", ".join(f"{name} {time:.3f}" for name, time in sorted(timed.items(), key=lambda x: x[1]))
        what = each.timed.held.outcome.patch, each.timed.site, each.timed.call.shapes
        choice = ("green", each.decisions[0].choice) if each.decisions else ("yellow", "undecided")
        rows.append((*what, times, choice))
    yield table("", ("patch", "site", "shapes", "times", "chosen"), rows)
    yield from (f"REFUSED: {each}" for each in content["refused"])
    yield from (f"undecided: {each}" for each in content["undecided"])
    yield from (f"not tuned: {each}" for each in content["not_tuned"])
    yield f"written to {content['file']}; use it with TWINKLE_NPU_TUNE={content['file']}"
