"""A backward that cannot be differentiated itself, and says so.

torch's `once_differentiable` says it only where the gradient that comes in requires one; that of a loss does not, and
the second derivatives of its inputs would be missing in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiated_once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        refusal: Any = torch._C._functions.DelayedError(
            b"npu_patch computes the gradient of a loss without its logits, which has no second derivative: "
            b"TWINKLE_NPU_LOSS=0 leaves the loss to torch",
            len(found),
        )
        return refusal(*(None if each is None else each.detach().requires_grad_() for each in found))

    return once
