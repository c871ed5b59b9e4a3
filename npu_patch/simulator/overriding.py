"""Puts a kernel of the simulator in the place of torch_npu's."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

# torch before 2.8 does not know the word: there a kernel in C++ is overridden as it is.
ALLOWED: dict[str, Any] = (
    {"allow_override": True} if "allow_override" in inspect.signature(torch.library.Library.impl).parameters else {}
)


def override(library: torch.library.Library, name: str, kernel: Callable[..., Any], key: str) -> None:
    library.impl(name, kernel, key, **ALLOWED)
