"""Where a walk looks: the sites that a patch finds in a scope, and what another patcher has taken there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial

from npu_patch.patches.patch import AnyPatch
from npu_patch.reporting.outcome import SKIPPED, Outcome
from npu_patch.sites import replaced_before
from npu_patch.sites.scope import Scope
from npu_patch.sites.sites import Site

Search = tuple[str, Callable[[], Iterable[Site]]]  # where, for a report of what went wrong there


Searched = set[tuple[str, int, str]]  # entries of registries: patch, id of the registry, name


def searches(patch: AnyPatch, scope: Scope, searched: Searched) -> Iterator[Search]:
    """Registries first, then modules, then the layers of the given model."""
    if scope.registries:
        yield "transformers' registries", partial(_registered, patch, searched)
    for module in scope.modules_for(patch.libraries):
        yield module.__name__, partial(patch.find, module)
    for each in scope.displaced:
        yield each.module.__name__, partial(each.found_by, patch.find)
    for layer in scope.layers:
        yield type(layer).__name__, partial(patch.in_layer, layer)


def _registered(patch: AnyPatch, searched: Searched) -> Iterator[Site]:
    """Each entry is looked at once per `apply()`, however many files are imported later."""
    for site in patch.registered():
        key = (patch.name, id(site.owner), site.name)
        if key not in searched:
            searched.add(key)
            yield site


def taken_by_others(
    scope: Scope, catalogue: Iterable[AnyPatch], enabled: Collection[str], known: Collection[str]
) -> Iterator[Outcome]:
    """What another patcher has taken in modeling modules, and no patch has found. `known`: labels of sites."""
    called = {patch.name: patch.called for patch in catalogue}
    for module in scope.modules:
        for label, patch, theirs in replaced_before.replaced_in(module, called):
            if patch in enabled and label not in known:
                yield Outcome(patch, label, SKIPPED, theirs)
