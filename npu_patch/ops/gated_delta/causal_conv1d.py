"""Causal depth-wise convolution over time, as linear attention layers apply it to q, k and v.

    y_t = activation(bias + sum over lags j < W of weight_{W-1-j} x_{t-j})

x is `[B, D, T]`, weight `[D, W]`, bias `[D]` or None, activation "silu" (or "swish"), or None. Without packing this is
torch's own convolution, as transformers writes it. Packed sequences are a sum of W products with shifted x, which can
leave out what reaches into another sequence, keeps the memory layout of x and rounds once, to its dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_patch.numerics.autograd import Context

ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """y `[B, D, T]` in the dtype of x.

    Packed sequences: seq_idx `[B, T]`, the number of the sequence of each token, or cu_seqlens `[N + 1]` with B = 1,
    cumulative lengths; values of neither are read on the host.
    """
    _check(x, weight, activation)
    if seq_idx is None and cu_seqlens is not None:
        if x.shape[0] != 1:
            raise ValueError(f"with cu_seqlens the batch must be 1, not {x.shape[0]}")
        position = torch.arange(x.shape[-1], device=x.device, dtype=cu_seqlens.dtype)
        seq_idx = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)[None]
    if seq_idx is not None:
        return _PackedConv1d.apply(x, weight, bias, seq_idx, activation is not None)
    width = weight.shape[-1]
    y = F.conv1d(
        x, weight[:, None].to(x.dtype), None if bias is None else bias.to(x.dtype), padding=width - 1, groups=x.shape[1]
    )[..., : x.shape[-1]]
    return y if activation is None else F.silu(y)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """y `[B, D, S]` for the next S tokens x `[B, D, S]`, after those in conv_state `[B, D, at least W - 1]`, which then
    holds the latest ones, in place."""
    _check(x, weight, activation)
    width = weight.shape[-1]
    if conv_state.shape[-1] < width - 1:
        raise ValueError(f"the state must hold at least {width - 1} tokens, not {conv_state.shape[-1]}")
    tokens, held = x.shape[-1], conv_state.shape[-1]
    seen = tokens + width - 1
    # No more than is asked for: as many as the state holds, for one token, and both uses take them as they are.
    known = torch.cat((conv_state[..., min(tokens, held - width + 1) :].to(x.dtype), x), -1)
    conv_state.copy_(known[..., -held:].detach())
    y = F.conv1d(
        known[..., -seen:], weight[:, None].to(x.dtype), None if bias is None else bias.to(x.dtype), groups=x.shape[1]
    )
    return y if activation is None else F.silu(y)


class _PackedConv1d(torch.autograd.Function):
    """Keeps the arguments only; the sum is made again for the activation's gradient."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, activated: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, seq_idx)
        ctx.activated = activated
        y = _sum(x, weight, bias, seq_idx)
        return (F.silu(y, inplace=True) if activated else y).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, seq_idx = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_sum = dy.to(_sum_dtype(x))
        if ctx.activated:
            d_sum = torch.ops.aten.silu_backward(d_sum, _sum(x, weight, bias, seq_idx))
        dx, d_weight = _gradients(d_sum, x, weight, seq_idx, needs_x, needs_weight)
        d_bias = d_sum.sum((0, -1)).to(bias.dtype) if needs_bias else None
        return dx, d_weight, d_bias, None, None


def _sum(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor) -> Tensor:
    """y before the activation, in float32 at least."""
    taps = weight.to(_sum_dtype(x)).unsqueeze(-1).unbind(1)  # W of [D, 1]
    y = x * taps[-1] if bias is None else torch.addcmul(bias[:, None].to(taps[0].dtype), x, taps[-1])
    for lag in range(1, min(weight.shape[-1], x.shape[-1])):
        y[..., lag:].addcmul_(x[..., :-lag] * _same(seq_idx, lag, x.dtype), taps[-1 - lag])
    return y


def _gradients(
    d_sum: Tensor, x: Tensor, weight: Tensor, seq_idx: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of x and weight; what a lag hides from the sum it hides from both, so d_sum is masked once for each lag."""
    taps = weight.to(d_sum.dtype).unsqueeze(-1).unbind(1)
    width, tokens = weight.shape[-1], x.shape[-1]
    dx = d_sum * taps[-1] if needs_x else None
    of_lags = [(d_sum * x).sum((0, -1))] if needs_weight else []
    for lag in range(1, min(width, tokens) if needs_x or needs_weight else 1):
        seen = d_sum[..., lag:] * _same(seq_idx, lag, d_sum.dtype)
        if dx is not None:
            dx[..., :-lag].addcmul_(seen, taps[-1 - lag])
        if needs_weight:
            of_lags.append(seen.mul_(x[..., :-lag]).sum((0, -1)))
    d_weight = None
    if needs_weight:
        missing = width - len(of_lags)  # where there are fewer tokens than weights
        d_weight = F.pad(torch.stack(of_lags[::-1], -1), (missing, 0)).to(weight.dtype)
    return None if dx is None else dx.to(x.dtype), d_weight


def _same(seq_idx: Tensor, lag: int, dtype: torch.dtype) -> Tensor:
    """1 where a token and the one `lag` before it are of one sequence, else 0: `[B, 1, T - lag]`, in the dtype of what
    it masks, as products of two dtypes are slower."""
    return (seq_idx[:, lag:] == seq_idx[:, :-lag])[:, None].to(dtype)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(x: Tensor, weight: Tensor, activation: str | None) -> None:
    if x.dim() != 3 or weight.dim() != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"x must be [B, D, T] and weight [D, W], not {list(x.shape)} and {list(weight.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, not {activation!r}")
