"""What `apply()` would do, without doing it: the same walk, which then binds nothing.

Needs no device: of an op it takes the implementation that a sound installation would use.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from types import ModuleType

import torch

from npu_patch.applying.choosing import Choosing
from npu_patch.applying.enabling import libraries_of
from npu_patch.applying.patched_site import PatchedSite
from npu_patch.applying.preparing import prepare
from npu_patch.applying.request import Request
from npu_patch.applying.state import STATE, PatchError, anything_applied
from npu_patch.applying.telling import warn_of_what_serves_nothing
from npu_patch.applying.walk import Walk
from npu_patch.measuring.self_check import Decisions
from npu_patch.patches import CATALOGUE
from npu_patch.patches.patch import AnyPatch
from npu_patch.reporting.report import Report
from npu_patch.serving.implementation import AnyChoice, Choice, choose
from npu_patch.sites.scope import Scope
from npu_patch.switches import Switches, resolve
from npu_patch.waiting.heads import NormSite, enter, leave


def dry_run(
    modules: Iterable[ModuleType],
    model: torch.nn.Module | None = None,
    *,
    device_type: str = "npu",
    registries: bool = True,
    switches: Switches | None = None,
) -> Report:
    """The report that `apply(model)` would give for these modeling modules; nothing is rebound.

    `model`: on any device, meta included; its live layers are looked at. `registries`: look at transformers'
    registries too, which are the same for every module.

    Raises:
        PatchError: where patches are in place: then there are no originals to look at.
    """
    if anything_applied():
        raise PatchError("dry_run(): patches are in place; call restore() first")
    switches = switches or resolve()
    report = Report(device=f"{device_type}, dry run")
    if not switches["patch"]:
        report.nothing_because = f"switched off by {switches.sources['patch']}"
        return report
    request = Request(model, device_type, switches)
    undone = ExitStack()
    choosing = Choosing(Decisions.of(switches, device_type))
    walk = Walk(CATALOGUE, request, report, choice_if_sound, choosing, partial(_bind_nothing, undone))
    with undone:
        undone.callback(STATE.journal.undo_to, STATE.journal.mark())
        prepare(request, report, first=True)  # in earnest, or patches would look at other layers
        entries = walk.enabled()
        scope = Scope.of(model, libraries_of(entries), modules=list(modules), registries=registries)
        walk.over(scope, entries)
    prepare(request, report, dry=True)
    if model is not None:
        warn_of_what_serves_nothing(report, [patch for patch, _ in entries], model)
    return report


def choice_if_sound(request: Request, report: Report, patch: AnyPatch) -> AnyChoice:
    """What is chosen here, or what would be if nothing were missing."""
    choice: AnyChoice = choose(patch.op.implementations, request.device_type, *request.of(patch.optional))
    if choice.candidates and not choice.forced:
        unmeasured = {each.name: "a dry run measures nothing" for each in choice.candidates}
        choice = Choice(choice.chosen, choice.declined | unmeasured)
    if choice.chosen is not None:
        return choice
    usual = [each for each in patch.op.implementations if not each.optional]
    if not usual and request.switches[patch.optional] is True:
        kernels = tuple(each for each in patch.op.implementations if request.device_type in each.device_types)
        return Choice(None, {}, kernels, forced=True)
    serving = [each for each in usual if request.device_type in each.device_types]
    chosen = serving[0] if serving else None
    return Choice(chosen, {name: why for name, why in choice.declined.items() if chosen and name != chosen.name})


def _bind_nothing(undone: ExitStack, patched: PatchedSite) -> None:
    """Patches that build on a norm find the original in the place of its replacement. Not so with a rotation: a layer
    that looks up the original one cannot be observed with its norms put off."""
    undone.callback(patched.replacement.calls.deactivate)
    if isinstance(patched.replacement.participant, NormSite):
        enter(patched.site.original, patched.replacement.participant)
        undone.callback(leave, patched.site.original)
