"""Which patched sites a forward of this model has to reach."""

from __future__ import annotations

from types import ModuleType

import torch

from npu_patch.lifecycle import PatchedSite
from npu_patch.patches.gated_delta_door import names_used
from npu_patch.sites import defining_class


def why_expected(held: PatchedSite, model: torch.nn.Module) -> str | None:
    """Why a forward with random tokens should call this replacement, or None where it need not: a class without live
    layers, a function that no live layer names, a registry's entry that the model does not ask for."""
    owner, name, layers = held.site.owner, held.site.name, held.outcome.layers
    if isinstance(owner, (type, torch.nn.Module)):
        return f"{layers} live layers" if layers else None
    if isinstance(owner, ModuleType):
        users = _users(model, owner, name)
        return f"{users[0]} calls it" if users else None
    if held.outcome.patch == "experts":
        return f"{layers} live layers" if layers else None
    asked_for = getattr(model.config, "_attn_implementation", None)
    if held.site.described.startswith("AttentionInterface") and asked_for == name:
        return f"the model's attention implementation is {name}"
    return None


def _users(model: torch.nn.Module, module: ModuleType, name: str) -> list[str]:
    """Live layers of this modeling file whose forward names the function."""
    classes = {defining_class(layer) for layer in model.modules() if type(layer).__module__ == module.__name__}
    return sorted(cls.__name__ for cls in classes if name in names_used(cls.forward))
