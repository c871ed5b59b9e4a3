"""Who would not hear of a call, as a replacement does not call a submodule: then the original serves it, and is heard.

Asked at every call, since hooks come and go; well under a microsecond for a module that nobody listens to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn import Module
from torch.nn.modules import module as of_all

PARAMETRIZATIONS = "parametrizations"  # where torch.nn.utils.parametrize keeps them; run when a parameter is read


def listener(module: Any, name: str) -> str | None:
    """Who listens to `module`, the one called `name`; None for nobody, and for what is no module."""
    if not isinstance(module, Module):
        return None
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"hooks on {name}"
    if "forward" in module.__dict__:
        return f"{name} is a {type(module).__name__} with a forward of its own"
    if PARAMETRIZATIONS in module._modules:
        return f"{name} is parametrized"
    return listener_to_all()


def first_listener(parts: Iterable[tuple[Any, str]]) -> str | None:
    """Who listens to one of several modules, with their names, none of which has modules of its own."""
    for module, name in parts:
        own = module.__dict__
        heard = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
        if heard or own["_backward_pre_hooks"] or own["_modules"] or "forward" in own:
            found = listener(module, name)
            if found is not None:
                return found
    return listener_to_all()


def listener_to_all() -> str | None:
    """Who listens to every module."""
    hooked = (
        of_all._global_forward_hooks
        or of_all._global_forward_pre_hooks
        or of_all._global_backward_hooks
        or of_all._global_backward_pre_hooks
    )
    return "hooks on all modules" if hooked else None


def listener_among(layer: Module) -> str | None:
    """Who listens to a module within `layer`."""
    for name, module in layer._modules.items():
        if module is not None and name != PARAMETRIZATIONS:
            found = listener(module, name) or (listener_among(module) if module._modules else None)
            if found is not None:
                return found
    return None
