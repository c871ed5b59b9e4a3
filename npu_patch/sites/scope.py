"""Where to look for what can be rebound: the files of one model, or all that are imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from npu_patch.sites.sites import Displaced, LiveModules, displaced_classes, loaded_modeling_modules, modules_of_model


@dataclass(frozen=True)
class Scope:
    """`modules`: modeling files. `displaced`: classes of the given model that lost their names in those. `layers`: of
    the given model, and `live`: the same by their classes, None where no model was given. `registries`: whether
    transformers' registries are looked at too."""

    modules: Sequence[ModuleType]
    displaced: Sequence[Displaced] = ()
    layers: Sequence[torch.nn.Module] = ()
    live: LiveModules | None = None
    registries: bool = True

    @classmethod
    def of(
        cls, model: torch.nn.Module | None, modules: Sequence[ModuleType] | None = None, registries: bool = True
    ) -> Scope:
        """`modules`: those of the model, or all that are imported, where none are given."""
        if model is None:
            return cls(loaded_modeling_modules() if modules is None else modules, registries=registries)
        own = modules_of_model(model) if modules is None else modules
        return cls(own, displaced_classes(model), list(model.modules()), LiveModules(model), registries)
