"""The ops of a gated delta net by definition, token by token: what originals and providers are compared with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    normalize: bool = False,
    bounds: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The output `[B, T, Hv, V]` and final states `[B or N, Hv, K, V]`, in the dtype given (float64, to be exact).

    g `[B, T, Hv]`, or `[B, T, Hv, K]` for a decay of its own for each channel of the key. bounds: where N packed
    sequences begin and end; initial_state is laid out as the final states are.
    """
    if normalize:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], 2) for x in (q * k.shape[-1] ** -0.5, k))
    g = g if g.dim() == 4 else g[..., None]
    outputs, finals = [], []
    packed = bounds is not None
    for index, (start, end) in enumerate(itertools.pairwise((0, q.shape[1]) if bounds is None else bounds)):
        state = initial_state[index : index + 1] if packed and initial_state is not None else initial_state
        if state is None:
            state = (k[:, 0, :, :, None] * v[:, 0, :, None]) * 0.0
        for t in range(start, end):
            state = state * g[:, t].exp()[..., None]
            written = beta[:, t, :, None] * (v[:, t] - (state * k[:, t, ..., None]).sum(-2))
            state = state + k[:, t, ..., None] * written[..., None, :]
            outputs.append((state * q[:, t, ..., None]).sum(-2))
        finals.append(state)
    return torch.stack(outputs, 1), torch.cat(finals)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, bounds: Sequence[int] | None = None
) -> Tensor:
    """y `[B, D, T]` for x `[B, D, T]`, weight `[D, W]`."""
    bounds = (0, x.shape[-1]) if bounds is None else bounds
    parts = []
    for start, end in itertools.pairwise(bounds):
        padded = F.pad(x[..., start:end], (weight.shape[-1] - 1, 0))
        parts.append((padded.unfold(-1, weight.shape[-1], 1) * weight[:, None]).sum(-1))
    y = torch.cat(parts, -1)
    y = y if bias is None else y + bias[:, None]
    return y if activation is None else F.silu(y)
