"""`apply`, `restore`, `applied`, `report`: what a training script calls."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from npu_patch import devices, log
from npu_patch.applying import int8_read_as_floats, live_layers, lost_gradients
from npu_patch.applying.binding import bind
from npu_patch.applying.choosing import Choosing, tuning_for
from npu_patch.applying.enabling import STILL_IN_PLACE, Enabled, choice_here, libraries_of
from npu_patch.applying.new_layers import HalfExecuted
from npu_patch.applying.options_kept import in_words
from npu_patch.applying.patched_site import as_they_stand
from npu_patch.applying.preparing import prepare
from npu_patch.applying.request import Request
from npu_patch.applying.state import STATE, PatchError, anything_applied
from npu_patch.applying.telling import tell, warn_of_what_serves_nothing
from npu_patch.applying.walk import Walk
from npu_patch.measuring import self_check
from npu_patch.measuring.self_check import Decisions
from npu_patch.patches import CATALOGUE
from npu_patch.reporting.outcome import NOTHING_APPLIED
from npu_patch.reporting.report import Report
from npu_patch.reporting.text import headline
from npu_patch.sites.late_imports import LateImports, is_modeling_module, is_within
from npu_patch.sites.other_tools import of_tool
from npu_patch.sites.scope import Scope
from npu_patch.switches import resolve


def apply(
    model: torch.nn.Module | None = None, *, device: str = "npu", strict: bool = False, **switches: Any
) -> Report:
    """Rebinds what it can prove, for `model` or for every modeling file that is imported now or later.

    Safe to call again: what is patched stays so, a second model's layers are added. On a machine without `device`
    nothing is rebound and the report says so.

    Args:
        model: any `nn.Module`, wrapped or not, on any device, meta included.
        device: "npu", or "cuda" and "cpu" for measuring and debugging: the device type whose tensors are served.
        strict: raise a `PatchError` at the first site that fails, after this call's rebindings are undone, and where
            there is no `device`.
        **switches: `rms_norm=False` and the like; they win over the environment (see `npu_patch.switches`).

    Raises:
        ValueError, TypeError: for a device, model or switch that is none, before anything is rebound.
    """
    request = _checked(model, device, switches, strict)
    report = Report(device=devices.described(request.device_type))
    if _is_for_nothing(request, report):
        return report
    decisions = Decisions.of(request.switches, request.device_type)
    walk = Walk(
        CATALOGUE,
        request,
        report,
        choice_here,
        Choosing(decisions, tuning_for(CATALOGUE, request, report)),
        bind,
    )
    with STATE.journal.lock:
        STATE.claim(request.device_type)
        report.warnings += STATE.tuned_by(request.switches.tune)
        report.warnings += STATE.taken_since()
        STATE.reports.append(report)
        try:
            with STATE.journal.transaction():
                _go(walk)
        except BaseException:
            STATE.reports.remove(report)
            raise
        report.outcomes = as_they_stand(report.outcomes, STATE.patched.values())
        STATE.note_layers(model)
    tell(report)
    return report


def restore() -> None:
    """Puts every touched object back, identical to what it was."""
    STATE.undo_to(0)


@contextlib.contextmanager
def applied(model: torch.nn.Module | None = None, **arguments: Any) -> Iterator[Report]:
    """`apply()` for the length of a `with` block; what an earlier `apply()` rebound stays."""
    with STATE.journal.lock:
        mark = STATE.journal.mark()
        report = apply(model, **arguments)
    try:
        yield report
    finally:
        STATE.undo_to(mark)


def report() -> Report:
    """Everything that is applied now, counters included, as one report."""
    if STATE.device_type is None:
        return Report(device="no device", nothing_because=NOTHING_APPLIED)
    combined = Report(device=devices.described(STATE.device_type))
    for each in STATE.reports:
        known = {id(outcome.calls) for outcome in combined.outcomes}
        combined.outcomes += [one for one in each if one.calls.active and id(one.calls) not in known]
        combined.notes += [note for note in each.notes if note not in combined.notes]
        combined.tuning = combined.tuning or each.tuning
        combined.warnings += [warning for warning in each.warnings if warning not in combined.warnings]
    with STATE.journal.lock:
        combined.outcomes = as_they_stand(combined.outcomes, STATE.patched.values())
        combined.warnings += [line for line in STATE.taken_since() if line not in combined.warnings]
    return combined


def _checked(model: Any, device: str, switches: Mapping[str, Any], strict: bool) -> Request:
    device_type = str(device).split(":", 1)[0]  # any index: the tensors of every device of a type are served
    if device_type not in devices.TYPES or not re.fullmatch(r"\w+(:\d+)?", str(device)):
        raise ValueError(f"apply(device={device!r}): accepted are {', '.join(devices.TYPES)}")
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"apply() takes a torch.nn.Module or nothing, not {type(model).__name__}")
    return Request(model, device_type, resolve(switches), strict)


def _is_for_nothing(request: Request, report: Report) -> bool:
    """Whether it is switched off or has no device; `report` is told, and says so.

    Raises:
        PatchError: where a device was to be there (`strict`).
    """
    if not request.switches["patch"]:
        report.nothing_because = f"switched off by {request.switches.sources['patch']}"
        if anything_applied():
            report.warnings.append(f"{report.nothing_because}: {STILL_IN_PLACE}")
        tell(report)
        return True
    reason = devices.why_none(request.device_type)
    if reason is None:
        return False
    report.nothing_because = f"no {request.device_type} device ({reason})"
    if request.strict:
        raise PatchError(f"apply(strict=True): {report.nothing_because}")
    log.warning(headline(report))
    return True


def _go(walk: Walk) -> None:
    """The walk, and what follows from it: for files that are imported later, or for the layers of the given model."""
    model, report, decisions = walk.request.model, walk.report, walk.choosing.decisions
    prepare(walk.request, report, first=True)
    entries = walk.enabled()
    libraries = libraries_of(entries)
    known = len(sys.modules)
    scope, half_executed = Scope.of(model, libraries).parted()
    walk.over(scope, entries)
    while known != len(sys.modules):  # registries import some
        known = len(sys.modules)
        meanwhile = Scope.of(model, libraries).parted()[0].beyond(scope)
        walk.over(meanwhile, entries)
        scope = scope.and_modules_of(meanwhile)
    report.warnings += in_words(walk.kept_options)
    _watch_imports(walk, entries, libraries, half_executed)
    if model is None:
        if decisions.checked:
            report.notes.append(self_check.NO_MODEL)
    else:
        decisions.decide(STATE.journal, report)
        report.outcomes += live_layers.reach(model)
        warn_of_what_serves_nothing(report, [patch for patch, _ in entries], model)
        if getattr(model, "use_kernels", False) or getattr(model, "_use_kernels", False):
            report.warnings.append(f"the model has hub kernels, which stay wherever they are bound{of_tool('kernels')}")
    prepare(walk.request, report)
    if model is not None:
        lost_gradients.warn(model, report)
        int8_read_as_floats.warn(model, report)
    if model is None or STATE.patched:
        STATE.registries |= {key[1:] for key in walk.searched}
        STATE.watch_layers()


def _watch_imports(
    walk: Walk, entries: Sequence[Enabled], libraries: Collection[str], half_executed: Sequence[ModuleType]
) -> None:
    """Of libraries, and of modeling files where no model was given: what is imported later is of no model yet.
    `half_executed`: what is being imported now."""
    every_family = walk.request.model is None
    later = replace(walk, request=replace(walk.request, model=None))  # a hook keeps no model alive

    def wanted(name: str) -> bool:
        return is_within(name, libraries) or (every_family and is_modeling_module(name))

    def after_import(module: ModuleType) -> None:
        with STATE.journal.lock:
            later.over(Scope.of_late(module), entries)

    def once_complete(module: ModuleType) -> None:
        with STATE.journal.lock:
            if any(each.module is module for each in STATE.half_executed):  # no other thread came before
                STATE.half_executed[:] = [each for each in STATE.half_executed if each.module is not module]
                after_import(module)

    if every_family or libraries:
        STATE.journal.insert(sys.meta_path, LateImports(wanted, after_import))
    for module in half_executed:
        STATE.journal.insert(STATE.half_executed, HalfExecuted(module, once_complete))
