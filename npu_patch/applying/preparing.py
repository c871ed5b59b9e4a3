"""The given model is prepared, before patches look at it or once everything is bound: what changes it, why the rest
does not."""

from __future__ import annotations

import weakref

import torch

from npu_patch import patches
from npu_patch.applying.enabling import STILL_IN_PLACE
from npu_patch.applying.request import Request
from npu_patch.applying.state import STATE, PatchError, Prepared
from npu_patch.patches.preparation import LeftAlone, Preparation, Rebinding
from npu_patch.reporting.outcome import FAILED, PREPARED, SKIPPED, Outcome
from npu_patch.reporting.report import Report


def prepare(request: Request, report: Report, *, first: bool = False, dry: bool = False) -> None:
    """By the preparations of the catalogue that come `first`, or by the others. `dry`: nothing is changed, and the
    report says what would be."""
    for each in patches.PREPARATIONS:
        if each.first != first or not _is_for(each, request.model):
            continue
        if not request.switches[each.switch]:
            off = f"{each.name}: switched off by {request.switches.sources[each.switch]}"
            if any(held.outcome.patch == each.name for held in STATE.prepared.values()):
                report.warnings.append(f"{off}, and {STILL_IN_PLACE}")
            elif request.switches.sources[each.switch] != "default":
                report.notes.append(off)
        elif request.model is None:
            report.notes.append(f"{each.name}: it prepares a model, and none was given")
        else:
            report.outcomes.append(_prepared(each, request.model, request, dry))


def _is_for(preparation: Preparation, model: torch.nn.Module | None) -> bool:
    return preparation.concerns is None or (model is not None and preparation.concerns(model))


def _prepared(preparation: Preparation, model: torch.nn.Module, request: Request, dry: bool) -> Outcome:
    outcome = Outcome(preparation.name, f"{type(model).__module__}.{type(model).__qualname__}", PREPARED)
    for held in STATE.prepared.values():
        if held.outcome.patch == preparation.name and held.shares_layers_with(model):
            if held.model() is model:
                return held.outcome
            outcome.status = SKIPPED
            outcome.reason = f"{type(held.model()).__name__}, with which it shares layers, is prepared already"
            return outcome
    try:
        with STATE.journal.transaction():
            reason = preparation.why_not(model, request.device_type, request.switches)
            if reason is not None:
                outcome.status, outcome.reason = SKIPPED, reason
            elif not dry:
                _change(preparation, model, request, outcome)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if request.strict:
            raise PatchError(f"{preparation.name}: {outcome.site}: {text}") from error
        outcome.status, outcome.reason, outcome.layers = FAILED, text, None
    return outcome


def _change(preparation: Preparation, model: torch.nn.Module, request: Request, outcome: Outcome) -> None:
    outcome.layers = 0
    for each in preparation.prepare(model, request.device_type, request.switches):
        if isinstance(each, LeftAlone):
            outcome.reason = each.why
        elif isinstance(each, Rebinding):
            if not STATE.journal.holds(each.owner, each.name):
                STATE.journal.rebind(each.owner, each.name, each.new)
        else:
            owner, change_back = each
            STATE.journal.changed(owner, preparation.name, change_back)
            outcome.layers += isinstance(owner, torch.nn.Module)
    if outcome.layers == 0:
        outcome.status, outcome.reason = SKIPPED, outcome.reason or "nothing in it was changed"
        return
    held, key = Prepared(weakref.ref(model), outcome), (id(model), preparation.name)
    STATE.journal.rebind(STATE.prepared, key, held, on_undo=outcome.calls.deactivate)
