"""What `apply()` would do, without doing it: its own walk, with the rebinding left out.

Needs no device: of an op it takes the implementation that a sound installation would use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType

import torch

from npu_patch.applying.api import Walk
from npu_patch.applying.patched_site import PatchedSite
from npu_patch.applying.state import PatchError, anything_applied
from npu_patch.patches.patch import Patch
from npu_patch.reporting.report import Report
from npu_patch.serving.implementation import Choice, choose
from npu_patch.sites.sites import Site
from npu_patch.switches import Switches, resolve
from npu_patch.waiting.heads import NORMS


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
    walk = DryWalk(model, device_type, False, switches, report, registries=registries)
    walk.look(modules)
    return report


class DryWalk(Walk):
    def __init__(self, *arguments: object, registries: bool) -> None:
        super().__init__(*arguments)
        self._registries = registries
        self._served: list[PatchedSite] = []

    def look(self, modules: Iterable[ModuleType]) -> None:
        patches = self._enabled()
        try:
            self._patch_modules(patches, modules)
        finally:
            self._forget()
        if self.model is not None:
            self._warn(patches)

    def _choose(self, patch: Patch) -> Choice:
        """What is chosen here, or what would be if nothing were missing."""
        triton = self.switches["triton"], self.switches.sources["triton"]
        choice = choose(patch.implementations, self.device_type, *triton)
        if choice.candidates and not choice.forced:
            unmeasured = {each.name: "a dry run measures nothing" for each in choice.candidates}
            choice = Choice(choice.chosen, choice.declined | unmeasured)
        if choice.chosen is not None:
            return choice
        usual = [each for each in patch.implementations if not each.optional]
        if not usual and self.switches["triton"] is True:
            kernels = tuple(each for each in patch.implementations if self.device_type in each.device_types)
            return Choice(None, {}, kernels, forced=True)
        serving = [each for each in usual if self.device_type in each.device_types]
        chosen = serving[0] if serving else None
        return Choice(chosen, {name: why for name, why in choice.declined.items() if chosen and name != chosen.name})

    def _registered(self, patch: Patch) -> Iterable[Site]:
        return super()._registered(patch) if self._registries else ()

    def _in_place(self) -> Sequence[PatchedSite]:
        return ()

    def _held(self, site: Site) -> Sequence[PatchedSite]:
        return ()

    def _bind(self, patched: PatchedSite) -> None:
        """Patches that look for norms that are served find the original in the place of its replacement."""
        self._served.append(patched)
        norm = NORMS.get(patched.replacement.function)
        if norm is not None:
            NORMS[patched.site.original] = norm

    def _forget(self) -> None:
        for patched in self._served:
            patched.replacement.calls.deactivate()
            if patched.replacement.function in NORMS:
                NORMS.pop(patched.site.original, None)
