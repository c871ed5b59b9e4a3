"""`apply`, `restore`, `applied`, `report`: what a training script calls."""

from __future__ import annotations

import contextlib
import re
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MethodType, ModuleType
from typing import Any

import torch

from npu_patch import devices, log
from npu_patch.applying.options_kept import Kept, in_words, kept_at
from npu_patch.applying.patched_site import PatchedSite, as_they_stand, own_forwards
from npu_patch.applying.state import STATE, PatchError, anything_applied, patched_sites
from npu_patch.measuring import self_check
from npu_patch.measuring.self_check import Decisions
from npu_patch.measuring.tuning import ORIGINAL, Signature, Tuning, tuned
from npu_patch.measuring.tuning import read as read_tuning
from npu_patch.patches import CATALOGUE
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.reporting.outcome import FAILED, NOTHING_APPLIED, PATCHED, SKIPPED, Outcome, TuningFile
from npu_patch.reporting.report import Report
from npu_patch.reporting.text import headline
from npu_patch.serving.dispatch import NO_MODEL
from npu_patch.serving.implementation import Choice, choose
from npu_patch.sites import replaced_before
from npu_patch.sites.sites import (
    Displaced,
    LateImports,
    LiveModules,
    Site,
    displaced_classes,
    kept_functions,
    loaded_modeling_modules,
    modules_of_model,
)
from npu_patch.sites.whose import whose
from npu_patch.switches import Switches, resolve
from npu_patch.waiting.heads import takes_part_as

STILL_IN_PLACE = "still in place from an earlier apply(); call restore() first"
TUNED_ORIGINAL = "tuned: the original is the fastest for every shape that was measured"


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
    device_type = _checked_device(device)
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"apply() takes a torch.nn.Module or nothing, not {type(model).__name__}")
    resolved = resolve(switches)
    report = Report(device=devices.described(device_type))
    if not resolved["patch"]:
        report.nothing_because = f"switched off by {resolved.sources['patch']}"
        if anything_applied():
            report.warnings.append(f"{report.nothing_because}: {STILL_IN_PLACE}")
        _tell(report)
        return report
    reason = devices.why_none(device_type)
    if reason is not None:
        report.nothing_because = f"no {device_type} device ({reason})"
        if strict:
            raise PatchError(f"apply(strict=True): {report.nothing_because}")
        log.warning(headline(report))
        return report
    tuning = _tuning(resolved, device_type, report)
    walk = Walk(model, device_type, strict, resolved, report, tuning)
    with STATE.journal.lock:
        STATE.claim(device_type)
        if STATE.reports and STATE.tune != resolved.tune:
            report.warnings.append(
                f"TWINKLE_NPU_TUNE is {resolved.tune or 'not set'} now and was {STATE.tune or 'not set'} before: what "
                "an earlier apply() rebound stays as it was; call restore() first"
            )
        STATE.tune = resolved.tune if not STATE.reports else STATE.tune
        report.warnings += STATE.bound_since()
        STATE.reports.append(report)
        try:
            with STATE.journal.transaction():
                walk.run()
        except BaseException:
            STATE.reports.remove(report)
            raise
        report.outcomes = as_they_stand(report.outcomes, STATE.patched.values())
        STATE.models += [] if model is None else [weakref.ref(model)]
    _tell(report)
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
        combined.outcomes += [outcome for outcome in each.outcomes if id(outcome.calls) not in known]
        combined.notes += [note for note in each.notes if note not in combined.notes]
        combined.tuning = combined.tuning or each.tuning
        combined.warnings += [warning for warning in each.warnings if warning not in combined.warnings]
    with STATE.journal.lock:
        combined.outcomes = as_they_stand(combined.outcomes, STATE.patched.values())
        combined.warnings += [line for line in STATE.bound_since() if line not in combined.warnings]
    return combined


@dataclass
class Walk:
    """One `apply()`: the catalogue in order, over the modeling modules in reach."""

    model: torch.nn.Module | None
    device_type: str
    strict: bool
    switches: Switches
    report: Report
    tuning: Tuning = field(default_factory=Tuning)
    kept_options: Counter[Kept] = field(default_factory=Counter)  # by sites
    searched: set[tuple[str, int, str]] = field(default_factory=set)  # in registries: patch, id of the registry, name

    def __post_init__(self) -> None:
        self.checked = self_check.wanted(self.switches, self.device_type)
        self.decisions = Decisions(self.device_type, self.switches["triton_cache"], self.checked)

    def run(self) -> None:
        patches = self._enabled()
        modules = loaded_modeling_modules() if self.model is None else modules_of_model(self.model)
        self._patch_modules(patches, modules)
        self.report.warnings += in_words(self.kept_options)
        if self.model is None:
            hook = LateImports(lambda module: self._after_late_import(patches, module))
            STATE.journal.insert(sys.meta_path, hook)
            if self.checked:
                self.report.notes.append(self_check.NO_MODEL)
        else:
            self.decisions.decide(STATE.journal, self.report)
            self._reach_live_layers(self.model)
            self._warn(patches)
            if getattr(self.model, "use_kernels", False) or getattr(self.model, "_use_kernels", False):
                self.report.warnings.append("the model uses hub kernels: those stay wherever they are bound")
        if self.model is None or STATE.patched:
            STATE.registries |= {key[1:] for key in self.searched}
            STATE.watch_new_layers()

    def _enabled(self) -> list[tuple[Patch, Choice]]:
        enabled = []
        for patch in CATALOGUE:
            choice = self._choose(patch)
            if not self.switches[patch.switch]:
                off = f"{patch.name}: switched off by {self.switches.sources[patch.switch]}"
                if any(held.outcome.patch == patch.name for held in self._in_place()):
                    self.report.warnings.append(f"{off}, and {STILL_IN_PLACE}")
                else:
                    self.report.notes.append(off)
            elif choice.chosen is None and not choice.candidates:
                usual = [each for each in patch.implementations if not each.optional]
                served = any(self.device_type in each.device_types for each in usual)
                if usual or self.switches["triton"] is False:  # else the line about Triton kernels says why
                    (self.report.warnings if served else self.report.notes).append(f"{patch.name}: {choice.why_none()}")
            else:
                enabled.append((patch, choice))
        return enabled

    def _in_place(self) -> Sequence[PatchedSite]:
        """What earlier calls rebound."""
        return patched_sites()

    def _choose(self, patch: Patch) -> Choice:
        asked, source = self.switches["triton"], self.switches.sources["triton"]
        choice = choose(patch.implementations, self.device_type, asked, source)
        if asked is not False and self.switches[patch.switch]:
            self._note_triton(patch, choice, asked)
        return choice

    def _note_triton(self, patch: Patch, choice: Choice, asked: bool | str) -> None:
        """Why no Triton kernel can be taken, once for all patches; a warning where they were asked for."""
        lines = self.report.warnings if asked is True else self.report.notes
        for each in patch.implementations:
            if not each.optional or self.device_type not in each.device_types:
                continue
            reason = choice.declined.get(each.name) or (NO_MODEL if asked is not True and self.model is None else None)
            line = f"no Triton kernel is used: {reason}"
            if reason is not None and line not in lines:
                lines.append(line)

    def _patch_modules(self, patches: Iterable[tuple[Patch, Choice]], modules: Iterable[ModuleType]) -> None:
        live = None if self.model is None else LiveModules(self.model)
        modules, patches = list(modules), list(patches)
        displaced = [] if self.model is None else displaced_classes(self.model)
        for patch, choice in patches:
            context = Context(self.device_type, choice.chosen, self.switches, live, choice)
            for site in self._found(patch, modules, displaced):
                self._patch_site(patch, choice, site, context)
        self._name_replaced({patch.name for patch, _ in patches}, modules)

    def _name_replaced(self, patches: set[str], modules: Iterable[ModuleType]) -> None:
        """What another patcher has taken, and no patch has found."""
        known = {outcome.site for outcome in self.report} | {held.site.label for held in self._in_place()}
        for module in modules:
            for label, patch, theirs in replaced_before.replaced_in(module):
                if patch in patches and label not in known:
                    self.report.outcomes.append(Outcome(patch, label, SKIPPED, theirs))

    def _found(self, patch: Patch, modules: Iterable[ModuleType], displaced: Iterable[Displaced]) -> Iterator[Site]:
        """Registries first, then modeling modules, then the layers of the given model."""
        layers = () if self.model is None else self.model.modules()
        searches = [("transformers' registries", partial(self._registered, patch))]
        searches += [(module.__name__, partial(patch.find, module)) for module in modules]
        searches += [(each.module.__name__, partial(each.found_by, patch.find)) for each in displaced]
        searches += [(type(layer).__name__, partial(patch.in_layer, layer)) for layer in layers]
        for where, search in searches:
            try:
                yield from list(search())
            except Exception as error:
                self._failed(patch, where, error)

    def _registered(self, patch: Patch) -> Iterator[Site]:
        """Each entry once per `apply()`, however many modeling files are imported later."""
        for site in patch.registered():
            key = (patch.name, id(site.owner), site.name)
            if key not in self.searched:
                self.searched.add(key)
                yield site

    def _patch_site(self, patch: Patch, choice: Choice, site: Site, context: Context) -> None:
        layers = patch.layers(site, context)
        stack = self._held(site)
        for held in stack:
            if held.outcome.patch == patch.name:
                held.outcome.layers = layers
                self.kept_options.update(kept_at(held, patch, self.switches))
                self.decisions.add(held.replacement.selection, context.live)
                self.decisions.describe(held.replacement.selection, held.outcome)
                self.report.outcomes.append(held.outcome)
                return
        if not (patch.around or all(held.around for held in stack)):
            return
        theirs = replaced_before.by_whom(site)
        try:
            with STATE.journal.transaction():
                decision = patch.replace(site, context)
                if isinstance(decision, Replacement):
                    self.decisions.add(decision.selection, context.live)
                    choices = self.tuning.of(patch.name, site.label, decision.variant) if patch.tunable else {}
                    if choices and set(choices.values()) == {ORIGINAL}:
                        decision.calls.deactivate()
                        outcome = Outcome(patch.name, site.label, SKIPPED, TUNED_ORIGINAL, layers=layers)
                        self.report.outcomes.append(outcome)
                        self._note_unfused(patch, site)
                        return
                    decision = self._tuned(patch, choice, site, decision, choices, context)
                    self._rebind(patch, choice, site, decision, layers)
                    if theirs is not None:
                        self.report.notes.append(f"{patch.name}: {site.label} was {theirs}; this patch is on top of it")
                elif decision.notable:
                    reason = theirs or decision.reason
                    self.report.outcomes.append(Outcome(patch.name, site.label, SKIPPED, reason, layers=layers))
        except Exception as error:
            self._failed(patch, site.label, error)

    def _note_unfused(self, patch: Patch, site: Site) -> None:
        """Patches that fuse what this site computes with what follows find nothing to build on."""
        for other in CATALOGUE:
            if patch.name in other.needs and self._choose(other).candidates:
                self.report.notes.append(f"{other.name} does not serve layers with {site.label}: {TUNED_ORIGINAL}")

    def _tuned(
        self,
        patch: Patch,
        choice: Choice,
        site: Site,
        replacement: Replacement,
        choices: Mapping[Signature, str],
        context: Context,
    ) -> Replacement:
        """The replacement, with the choices of the tuning file if it has any for this site."""
        if not choices:
            return replacement
        others = {
            each.name: patch.replace(site, replace(context, implementation=each, choice=None))
            for each in patch.implementations
            if each.name in choices.values()
            and each.name not in _absent(choice)
            and (each is not choice.chosen or choice.candidates)  # the usual one, unless that may be a Triton kernel
        }
        for other in others.values():
            self.decisions.add(getattr(other, "selection", None), context.live)
        ways = {name: (other.function, other.calls) for name, other in others.items() if isinstance(other, Replacement)}
        function = tuned(replacement.function, site.original, replacement.calls, choices, ways)
        takes_part_as(function, replacement.function)
        return replace(replacement, function=function)

    def _held(self, site: Site) -> Sequence[PatchedSite]:
        return STATE.patched.get((id(site.owner), site.name), ())

    def _rebind(self, patch: Patch, choice: Choice, site: Site, replacement: Replacement, layers: int | None) -> None:
        choice = replacement.choice or choice
        outcome = Outcome(
            patch.name,
            site.label,
            PATCHED,
            variant=replacement.variant,
            implementation=choice.chosen.name if choice.chosen else "",
            declined=choice.declined,
            calls=replacement.calls,
            layers=layers,
        )
        self.decisions.describe(replacement.selection, outcome)
        self._bind(PatchedSite(site, replacement, outcome, patch.around, self.switches))
        self.report.outcomes.append(outcome)

    def _bind(self, patched: PatchedSite) -> None:
        site, replacement = patched.site, patched.replacement
        key = (id(site.owner), site.name)

        def forget() -> None:
            replacement.calls.deactivate()
            STATE.patched[key].pop()  # the journal undoes the last one first
            if not STATE.patched[key]:
                del STATE.patched[key]

        STATE.journal.rebind(site.owner, site.name, replacement.function, on_undo=forget)
        STATE.patched.setdefault(key, []).append(patched)

    def _failed(self, patch: Patch, label: str, error: Exception) -> None:
        if self.strict:
            raise PatchError(f"{patch.name}: {label}: {type(error).__name__}: {error}") from error
        self.report.outcomes.append(Outcome(patch.name, label, FAILED, f"{type(error).__name__}: {error}"))

    def _after_late_import(self, patches: list[tuple[Patch, Choice]], module: ModuleType) -> None:
        with STATE.journal.lock:
            self._patch_modules(patches, [module])

    def _reach_live_layers(self, model: torch.nn.Module) -> None:
        """Layers that keep a forward or a function of their own are bound to the replacement too, or reported."""
        unreached: dict[tuple[str, str], list[torch.nn.Module]] = {}
        functions = {
            id(stack[0].site.original): stack[-1].replacement.function
            for stack in STATE.patched.values()
            if isinstance(stack[0].site.owner, ModuleType)
        }
        for module in model.modules():
            for owner, name, kept in list(kept_functions(module)):
                if id(kept) in functions:
                    STATE.journal.rebind(owner, name, functions[id(kept)])
        for module, stack, bound in own_forwards(model, STATE.patched):
            function = stack[-1].replacement.function
            if bound.reachable:
                if getattr(bound.bound, "__func__", None) is not function:
                    STATE.journal.rebind(module, bound.name, MethodType(function, module))
                continue
            STATE.unreached.add(module)
            for held in stack:
                unreached.setdefault((held.outcome.patch, held.site.label, whose(bound.bound)), []).append(module)
                held.outcome.layers = (held.outcome.layers or 1) - 1
        for (patch, label, name), modules in unreached.items():
            reason = f"live layers whose own forward is {name}, which hides the class's"
            self.report.outcomes.append(Outcome(patch, label, SKIPPED, reason, layers=len(modules)))

    def _warn(self, patches: Iterable[tuple[Patch, Choice]]) -> None:
        """A patch that found something it should serve in this model, and serves none of it."""
        for patch, _ in patches:
            found = [o for o in self.report if o.patch == patch.name and o.layers != 0]
            outcomes = [o for o in found if o.reason != TUNED_ORIGINAL]
            if outcomes and not any(outcome.status == PATCHED for outcome in outcomes):
                self.report.warnings.append(
                    f"{patch.name}: nothing in {type(self.model).__name__} is served; {len(outcomes)} sites were found"
                )


def _checked_device(device: str) -> str:
    device_type = str(device).split(":", 1)[0]  # any index: the tensors of every device of a type are served
    if device_type not in devices.TYPES or not re.fullmatch(r"\w+(:\d+)?", str(device)):
        raise ValueError(f"apply(device={device!r}): accepted are {', '.join(devices.TYPES)}")
    return device_type


def _absent(choice: Choice) -> set[str]:
    """Implementations that this machine or device cannot run."""
    return {name for name, why in choice.declined.items() if not why.endswith("comes first")}


def _choices(patch: Patch, device_type: str) -> list[str]:
    """What a tuning file may choose for it."""
    return [each.name for each in patch.implementations if patch.tunable and device_type in each.device_types]


def _tuning(switches: Switches, device_type: str, report: Report) -> Tuning:
    if switches.tune is None:
        return Tuning()
    tuning = read_tuning(switches.tune, device_type, {patch.name: _choices(patch, device_type) for patch in CATALOGUE})
    if tuning.refused is not None:
        report.warnings.append(f"the tuning file {switches.tune} is not used: {tuning.refused}")
        return Tuning()
    by_name = {(patch.name, each.name): each for patch in CATALOGUE for each in patch.implementations}
    for patch, name in sorted(tuning.choices):
        absent = by_name[patch, name].missing()
        if absent is not None:
            report.warnings.append(f"the tuning file {switches.tune} chooses {name} for {patch}, absent here: {absent}")
    report.tuning = TuningFile(switches.tune, tuning.count)
    return tuning


def _tell(report: Report) -> None:
    """In the log: one line, and what the user should know without asking for the report."""
    log.info(headline(report))
    for message in report.warnings:
        log.warning(message)
    for outcome in report.failed:
        log.warning(f"{outcome.patch}: {outcome.site} failed: {outcome.reason}")
