"""The hook by which transformers, peft and trl let a checkpointed layer have gradients. Each of them has its own."""

from __future__ import annotations

from types import FunctionType
from typing import Any


def _asks_for_gradients(module: Any, input: Any, output: Any) -> None:
    output.requires_grad_(True)


SAME = ("co_code", "co_names", "co_consts", "co_freevars", "co_argcount", "co_nlocals", "co_kwonlyargcount")


def only_asks_for_gradients(hook: object) -> bool:
    """Whether a forward hook does nothing but `output.requires_grad_(True)`, which without gradients means nothing.
    Its code is compared, whatever it is called: it is that statement alone and reaches nothing else."""
    if not isinstance(hook, FunctionType):
        return False
    return all(getattr(hook.__code__, name) == getattr(_asks_for_gradients.__code__, name) for name in SAME)
