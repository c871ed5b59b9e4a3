"""Modules that are imported from now on, told of once they were executed. Imports no torch: it may be one of them."""

from __future__ import annotations

import importlib.abc
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

MODELING_PACKAGES = ("transformers.models.", "transformers_modules.")


def is_modeling_module(name: str) -> bool:
    return name.startswith(MODELING_PACKAGES) and name.rsplit(".", 1)[-1].startswith("modeling_")


def is_within(name: str, libraries: Iterable[str]) -> bool:
    """Whether a module is one of `libraries`, packages or modules by their dotted names, or inside one."""
    return any(name == each or name.startswith(f"{each}.") for each in libraries)


_announced: set[int] = set()  # by id, modules whose import ends with their being told of


def is_half_executed(module: ModuleType) -> bool:
    """Whether it is being imported now, and what it defines is not all there yet."""
    importing = getattr(getattr(module, "__spec__", None), "_initializing", False)
    return bool(importing) and id(module) not in _announced


class LateImports(importlib.abc.MetaPathFinder):
    """Calls `after_import(module)` once each module with a `wanted` name that is imported from now on was executed."""

    def __init__(self, wanted: Callable[[str], bool], after_import: Callable[[ModuleType], None]) -> None:
        self._wanted, self._after_import = wanted, after_import
        self._searching: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not self._wanted(fullname) or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _NotifyingLoader(spec.loader, self._after_import)
        return spec


class _NotifyingLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, after_import: Callable[[ModuleType], None]) -> None:
        self._loader, self._after_import = loader, after_import

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader  # inspect.getsource and pickling see no wrapper
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _announced.add(id(module))
        try:
            self._after_import(module)
        finally:
            _announced.discard(id(module))
