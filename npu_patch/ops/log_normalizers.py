"""logsumexp of each row of logits, in chunks: what a z-loss is made of. Its gradient makes the chunks again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.selective_checkpointing import unseen
from npu_patch.ops.chunked_loss import Plan, StandIn, chunks, flat, gradients_again, keep
from npu_patch.ops.differentiated_once import differentiated_once
from npu_patch.ops.head_products import Logits


def log_normalizers(logits: Logits, stand_in: StandIn | None = None) -> Tensor:
    """In float32, `[...]` of logits `[..., V]`."""
    shape, logits = logits.terms[0].rows.shape[:-1], flat(logits)
    plan = Plan.of(logits, stand_in)
    found: Tensor = _LogNormalizers.apply(plan, plan.autograds, *logits.tensors)
    return found.view(shape)


class _LogNormalizers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, stand_in: Tensor | None, *tensors: Tensor | None) -> Tensor:
        logits = plan.logits
        with unseen(), torch.autocast(logits.device.type, enabled=False):
            rows = chunks(logits.rows, logits.vocabulary)
            found = torch.cat([logits.computed(each)[0].float().logsumexp(-1) for each in rows])
        keep(ctx, plan, tensors, found)
        return found

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        normalizers, *tensors = ctx.saved_tensors
        if grad is None:
            return (None,) * (2 + len(tensors))

        def of_part(computed: Tensor, rows: slice, start: int | None) -> Tensor:
            shares = (computed.float() - normalizers[rows, None]).exp_()
            return shares.mul_(grad[rows, None]).to(computed.dtype)

        return None, *gradients_again(ctx, tensors, of_part)
