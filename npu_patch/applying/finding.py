"""Where a walk looks: the sites that a patch finds in a scope, and what another patcher has taken there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from npu_patch.patches.patch import AnyPatch
from npu_patch.reporting.outcome import SKIPPED, Outcome
from npu_patch.sites import replaced_before
from npu_patch.sites.scope import Scope
from npu_patch.sites.sites import Site

Search = tuple[str, Callable[[], Iterable[Site]]]  # where, for a report of what went wrong there


@dataclass
class Registries:
    """transformers' registries: each entry is looked at once per `apply()`, however many files are imported later."""

    searched: set[tuple[str, int, str]] = field(default_factory=set)  # patch, id of the registry, name

    def sites(self, patch: AnyPatch) -> Iterator[Site]:
        for site in patch.registered():
            key = (patch.name, id(site.owner), site.name)
            if key not in self.searched:
                self.searched.add(key)
                yield site

    @property
    def keys(self) -> set[tuple[int, str]]:
        """Of the entries, as sites."""
        return {key[1:] for key in self.searched}


def searches(patch: AnyPatch, scope: Scope, registries: Registries) -> Iterator[Search]:
    """Registries first, then modules, then the layers of the given model."""
    if scope.registries:
        yield "transformers' registries", partial(registries.sites, patch)
    for module in scope.modules_for(patch.libraries):
        yield module.__name__, partial(patch.find, module)
    for each in scope.displaced:
        yield each.module.__name__, partial(each.found_by, patch.find)
    for layer in scope.layers:
        yield type(layer).__name__, partial(patch.in_layer, layer)


def taken_by_others(
    scope: Scope, catalogue: Iterable[AnyPatch], enabled: Collection[str], known: Collection[str]
) -> Iterator[Outcome]:
    """What another patcher has taken in modeling modules, and no patch has found. `known`: labels of sites."""
    called = {patch.name: patch.called for patch in catalogue}
    for module in scope.modules:
        for label, patch, theirs in replaced_before.replaced_in(module, called):
            if patch in enabled and label not in known:
                yield Outcome(patch, label, SKIPPED, theirs)
