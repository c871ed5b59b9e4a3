"""What another patcher took before `apply()` came: named in the report, instead of what a probe makes of it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from npu_patch.sites.names_used import names_used
from npu_patch.sites.other_tools import tool_of
from npu_patch.sites.sites import Site
from npu_patch.sites.whose import OWN, home, package, whose

EXPECTED = ("transformers", "torch", "builtins", OWN)
NPU_HOMES = ("npu", "ascend", "mindspeed")


def by_whom(site: Site) -> str | None:
    """Who bound what stands at a site, if that is not the site's own package."""
    if isinstance(site.owner, Mapping):
        return _theirs(site.original, EXPECTED)
    if isinstance(site.owner, ModuleType):
        return _in_module(site.owner, site.name)
    if isinstance(site.owner, type):
        own = site.owner.__module__.split(".", 1)[0]
        theirs = _theirs(site.original, (*EXPECTED, own, *sys.stdlib_module_names))
        return theirs or (f"already replaced by {whose(site.owner)}" if tool_of(site.owner.__module__) else None)
    return None


def is_notable(site: Site, words: Sequence[str]) -> bool:
    """Whether it is a layer of another tool's with one of the words in its name: it took the place of a site."""
    return (
        isinstance(site.owner, type)
        and tool_of(site.owner.__module__) is not None
        and any(word in site.owner.__name__.lower() for word in words)
    )


def replaced_in(module: ModuleType, called: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, str, str]]:
    """Of each function, class and forward that `module` defines and that is another's now: its dotted name, the patch
    that it would have been for, and whose it is. `called`: by patch, words in the names of most of its sites."""
    for name, value in list(vars(module).items()):
        patch = next((patch for patch, words in called.items() if any(word in name.lower() for word in words)), None)
        if patch is None:
            continue
        theirs = _in_module(module, name)
        if theirs is not None:
            yield f"{module.__name__}.{name}", patch, theirs
        elif isinstance(value, type) and value.__module__ == module.__name__ and "forward" in vars(value):
            theirs = by_whom(Site(value, "forward", vars(value)["forward"]))
            if theirs is not None:
                yield f"{module.__name__}.{name}.forward", patch, theirs


def _in_module(module: ModuleType, name: str) -> str | None:
    """A name that the source of a module defines, with something of another package under it."""
    value = vars(module).get(name)
    if not callable(value) or isinstance(value, torch.nn.Module):  # the kernels package makes modules of functions
        return None
    theirs = _theirs(value, (*EXPECTED, module.__name__.split(".", 1)[0], *sys.stdlib_module_names))
    return theirs if theirs is not None and _defines(module, name) else None


def _defines(module: ModuleType, name: str) -> bool:
    """Not so where it imports the name, from fla say."""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return False
    return re.search(rf"^(def|class) {re.escape(name)}\b", source, re.MULTILINE) is not None


def _theirs(value: Any, expected: tuple[str, ...]) -> str | None:
    if value is None or package(value) in expected:
        return None
    return (
        f"already an NPU replacement of {whose(value)}" if _is_for_npu(value) else f"already replaced by {whose(value)}"
    )


def _is_for_npu(value: Any) -> bool:
    """Told from where it comes from, or from the operators that it calls."""
    forward = vars(value).get("forward") if isinstance(value, type) else value
    if any(word in home(value).lower() for word in NPU_HOMES):
        return True
    return any(name == "torch_npu" or name.startswith("npu_") for name in names_used(forward))
