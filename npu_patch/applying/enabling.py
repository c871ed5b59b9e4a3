"""Which patches a walk goes through, with which implementations; and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from npu_patch.applying.request import Request
from npu_patch.applying.state import patched_sites
from npu_patch.patches.patch import AnyPatch
from npu_patch.reporting.report import Report
from npu_patch.serving.dispatch import NO_MODEL
from npu_patch.serving.implementation import TRITON, AnyChoice, choose

STILL_IN_PLACE = "still in place from an earlier apply(); call restore() first"
ChoiceOf = Callable[[Request, Report, AnyPatch], AnyChoice]


class Enabled(NamedTuple):
    patch: AnyPatch
    choice: AnyChoice


def enabled(catalogue: Iterable[AnyPatch], request: Request, choice_of: ChoiceOf, report: Report) -> list[Enabled]:
    """Those that are switched on and that an implementation can serve; `report` is told of the others."""
    in_place = {held.outcome.patch for held in patched_sites()}
    found = []
    for patch in catalogue:
        choice = choice_of(request, report, patch)
        if not request.switches[patch.switch]:
            off = f"{patch.name}: switched off by {request.switches.sources[patch.switch]}"
            if patch.name in in_place:
                report.warnings.append(f"{off}, and {STILL_IN_PLACE}")
            elif request.switches.sources[patch.switch] != "default":  # nobody asked for it
                report.notes.append(off)
        elif choice.chosen is None and not choice.candidates:
            usual = [each for each in patch.op.implementations if not each.optional]
            served = any(request.device_type in each.device_types for each in usual)
            optional, source = request.of(patch.optional)  # for Triton kernels, a line of their own says why
            told = optional is not False if patch.optional == TRITON else source == "default"
            if usual or not told:
                (report.warnings if served else report.notes).append(f"{patch.name}: {choice.why_none()}")
        else:
            found.append(Enabled(patch, choice))
    return found


def libraries_of(entries: Iterable[Enabled]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(library for patch, _ in entries for library in patch.libraries))


def choice_here(request: Request, report: Report, patch: AnyPatch) -> AnyChoice:
    """Of the implementations that this machine has."""
    choice: AnyChoice = choose(patch.op.implementations, request.device_type, *request.of(patch.optional))
    if patch.optional == TRITON and request.switches[TRITON] is not False and request.switches[patch.switch]:
        _note_triton(request, report, patch, choice)
    return choice


def _note_triton(request: Request, report: Report, patch: AnyPatch, choice: AnyChoice) -> None:
    """Why no Triton kernel can be taken, once for all patches; a warning where they were asked for."""
    asked = request.switches["triton"] is True
    lines = report.warnings if asked else report.notes
    for each in patch.op.implementations:
        if not each.optional or request.device_type not in each.device_types:
            continue
        reason = choice.declined.get(each.name) or (NO_MODEL if not asked and request.model is None else None)
        line = f"no Triton kernel is used: {reason}"
        if reason is not None and line not in lines:
            lines.append(line)
