"""Where to look for what can be rebound: the files of one model, or all that are imported, and libraries beside."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch

from npu_patch.sites.late_imports import is_half_executed, is_modeling_module, is_within
from npu_patch.sites.sites import (
    Displaced,
    LiveModules,
    displaced_classes,
    loaded_modules,
    modules_of_model,
)


@dataclass(frozen=True)
class Scope:
    """`modules`: modeling files. `libraries`: modules of the libraries that patches name, for those patches alone.
    `displaced`: classes of the given model that lost their names in its files. `layers`: of the given model, and
    `live`: the same by their classes, None where no model was given. `registries`: whether transformers' registries are
    looked at too."""

    modules: Sequence[ModuleType]
    libraries: Sequence[ModuleType] = ()
    displaced: Sequence[Displaced] = ()
    layers: Sequence[torch.nn.Module] = ()
    live: LiveModules | None = None
    registries: bool = True

    @classmethod
    def of(
        cls,
        model: torch.nn.Module | None,
        libraries: Collection[str] = (),
        *,
        modules: Sequence[ModuleType] | None = None,
        registries: bool = True,
    ) -> Scope:
        """`modules`: those of the model, or all that are imported, where none are given. Libraries are looked at as a
        whole: their layers may be put into the model later."""
        loaded = loaded_modules(partial(is_within, libraries=libraries))
        if model is None:
            found = loaded_modules(is_modeling_module) if modules is None else modules
            return cls(found, loaded, registries=registries)
        found = modules_of_model(model) if modules is None else modules
        return cls(found, loaded, displaced_classes(model), list(model.modules()), LiveModules(model), registries)

    @classmethod
    def of_late(cls, module: ModuleType) -> Scope:
        """What is imported after the walk."""
        return cls([module]) if is_modeling_module(module.__name__) else cls((), [module])

    def parted(self) -> tuple[Scope, list[ModuleType]]:
        """Without the modules that are being imported now, and those: they are looked through once they are complete.
        The files of a model that exists stay."""
        of_model = self.modules if self.live is not None else ()
        found = {id(each): each for each in (*self.modules, *self.libraries) if is_half_executed(each)}
        half = [each for each in found.values() if not any(each is known for known in of_model)]
        modules, libraries = ([m for m in ms if id(m) not in found] for ms in (self.modules, self.libraries))
        return replace(self, modules=of_model or modules, libraries=libraries), half

    def beyond(self, other: Scope) -> Scope:
        """The modules that are not in `other`, alone."""
        known = {id(each) for each in (*other.modules, *other.libraries)}
        modules, libraries = ([m for m in ms if id(m) not in known] for ms in (self.modules, self.libraries))
        return Scope(modules, libraries, live=self.live, registries=False)

    def and_modules_of(self, other: Scope) -> Scope:
        return replace(self, modules=[*self.modules, *other.modules], libraries=[*self.libraries, *other.libraries])

    def modules_for(self, libraries: Collection[str]) -> list[ModuleType]:
        """To look through for a patch that names these libraries: each module once, be it the model's own too."""
        named = [module for module in self.libraries if is_within(module.__name__, libraries)]
        return list({id(module): module for module in (*self.modules, *named)}.values())
