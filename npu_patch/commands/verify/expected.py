"""Which patched sites a forward of this model has to reach."""

from __future__ import annotations

from collections.abc import Collection
from types import ModuleType

import torch

from npu_patch.applying.patched_site import PatchedSite
from npu_patch.applying.state import patched_sites
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import defining_class


def why_expected(held: PatchedSite, model: torch.nn.Module, computed: Collection[type]) -> str | None:
    """Why a forward with random tokens should call this replacement, or None where it need not: a class without live
    layers, a function that no live layer names, a registry's entry that the model does not ask for.

    `computed`: classes whose own replacement ran; what is inside their layers is computed by that."""
    owner, name, layers = held.site.owner, held.site.name, held.outcome.layers
    if isinstance(owner, type):
        outside = _outside(model, owner, [cls for cls in computed if cls is not owner])
        return f"{outside} live layers" if layers and outside else None
    if isinstance(owner, torch.nn.Module):
        return "a live layer"
    if isinstance(owner, ModuleType):
        users = _users(model, owner, name, computed)
        if held.replacement.one_of_several and not held.outcome.calls.fell_through:
            users = [user for user in users if not _ran_another(held, model, user)]
        return f"{users[0]} calls it" if users else None
    return f"{layers} live layers" if layers else held.replacement.looked_up_by(model)


def _ran_another(held: PatchedSite, model: torch.nn.Module, user: str) -> bool:
    """Whether the layer called another function of the same patch instead, as its configuration says."""
    same = [each for each in patched_sites() if each.outcome.patch == held.outcome.patch and each is not held]
    return any(
        each.outcome.calls.ran
        and each.site.owner is held.site.owner
        and user in _users(model, held.site.owner, each.site.name)
        for each in same
    )


def _outside(model: torch.nn.Module, cls: type, computed: Collection[type]) -> int:
    """How many layers of a class are in no layer of one that is computed as a whole."""
    within = {id(each) for layer in model.modules() if defining_class(layer) in computed for each in layer.modules()}
    return sum(defining_class(layer) is cls and id(layer) not in within for layer in model.modules())


def _users(model: torch.nn.Module, module: ModuleType, name: str, computed: Collection[type] = ()) -> list[str]:
    """Live layers of this modeling file whose forward names the function, and is not computed as a whole."""
    classes = {defining_class(layer) for layer in model.modules() if type(layer).__module__ == module.__name__}
    classes -= set(computed)
    return sorted(cls.__name__ for cls in classes if name in names_used(cls.forward))
