"""What the chunks of the gated delta rule have before any state is known; the algebra is in algebra.py.

Normalizing costs no pass over q or k. If the algebra is to hold for k / |k|, then V / |k| obeys the same equations with
k itself, beta / |k|² in place of beta and (beta / |k|) v of beta v; and 1 / |q| is a factor of rows, as exp(c) is. So q
and k are multiplied as they come, and where they come in bfloat16 or float16, q k^T and k k^T are made of those, with
exact products summed in float32. The gradient of the norm needs no more products either: it is the sum over the width
of x dx.

Rows of q and of k lie in one tensor `[.., 2 C, K]`, so that products they share are one. Key heads that serve several
value heads are never repeated: they broadcast where a decay or beta is multiplied in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from npu_patch.ops.gated_delta.accumulating_bmm import accumulates, accumulating_bmm
from npu_patch.ops.gated_delta.layout import Boundaries, Layout

NORM_EPS = 1e-6


@dataclass(frozen=True)
class Problem:
    """The arguments: q and k `[B, T, Hk, K]`, v `[B, T, Hv, V]`, g and beta `[B, T, Hv]`, initial_state
    `[B, Hv, K, V]` or None; in which `dtype` to compute."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor | None
    normalize: bool
    layout: Layout
    bounds: Boundaries | None
    dtype: torch.dtype

    @property
    def heads(self) -> tuple[int, int]:
        """Of keys, and of values for each."""
        return self.k.shape[2], self.v.shape[2] // self.k.shape[2]

    @property
    def scale(self) -> float:
        return self.k.shape[-1] ** -0.5

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.v.device)


@dataclass
class Chunks:
    """What each chunk has before any state is known. n counts chunks and value heads, m chunks and key heads."""

    qk: Tensor
    """`[m, 2 C, K]`: q, then k, as given; in their own dtype where the device multiplies that into float32."""
    norm: Tensor | None
    """`[m, 2 C]`: 1 / |q|, then 1 / |k|, if asked to normalize."""
    rows: Tensor
    """`[n, 2 C]`: scale / |q|, then -beta / |k|²."""
    gain: Tensor
    """`[n, C]`: beta / |k|."""
    carried: Tensor
    """`[n, C]`: exp(c)."""
    enter: Tensor
    """`[n, 2 C]`: exp(c) of the rows."""
    leave: Tensor
    """`[n, C]`: exp(c_C - c)."""
    decay: Tensor
    """`[n, C, C]`: D."""
    pairs: Tensor
    """`[n, 2 C, C]`: (scale / |q|) q k^T D, then k k^T D."""
    reads: Tensor
    """`[n, 2 C, K]`: what multiplies the state: q and k by `enter`."""
    scaled_v: Tensor
    """`[n, C, V]`: v by `gain`."""


def make_chunks(problem: Problem) -> Chunks:
    layout, bounds = problem.layout, problem.bounds
    c, (key_heads, per_key) = layout.chunk, problem.heads
    width, heads = problem.k.shape[-1], key_heads * per_key
    chunk_heads = layout.chunks * problem.v.shape[0]

    given = torch.promote_types(problem.q.dtype, problem.k.dtype)
    if not accumulates(given, problem.dtype, problem.q.device.type):
        given = problem.dtype
    qk = torch.empty(chunk_heads * key_heads, 2 * c, width, dtype=given, device=problem.q.device)
    view(problem, qk[:, :c], key_heads).copy_(layout.chunked(problem.q))
    view(problem, qk[:, c:], key_heads).copy_(layout.chunked(problem.k))
    products = accumulating_bmm(qk, qk[:, c:].mT, problem.dtype)

    beta, g = problem.empty(chunk_heads * heads, c), problem.empty(chunk_heads * heads, c)
    view(problem, beta, heads).copy_(layout.chunked(problem.beta))
    view(problem, g, heads).copy_(layout.chunked(problem.g))
    norm, gain = None, beta
    rows = problem.empty(chunk_heads * heads, 2 * c)
    if problem.normalize:
        norm = problem.empty(chunk_heads * key_heads, 2 * c)
        torch.linalg.vector_norm(qk[:, :c], dim=-1, dtype=problem.dtype, out=norm[:, :c])
        norm[:, :c].square_()
        norm[:, c:] = products[:, c:].diagonal(dim1=-2, dim2=-1)
        norm.add_(NORM_EPS).rsqrt_()
        each = of_value_heads(norm, per_key)
        gain = beta * each[:, c:]
        torch.mul(each[:, :c], problem.scale, out=rows[:, :c])
        torch.mul(gain, each[:, c:], out=rows[:, c:]).neg_()
    else:
        rows[:, :c] = problem.scale
        torch.neg(beta, out=rows[:, c:])
    scaled_v = problem.empty(chunk_heads * heads, c, problem.v.shape[-1])
    torch.mul(layout.chunked(problem.v), view(problem, gain, heads).unsqueeze(-1), out=view(problem, scaled_v, heads))

    # c_i - c_j as the sum of g between them: the difference of two sums would lose digits after a strong decay.
    future = torch.ones(c, c, dtype=torch.bool, device=qk.device).triu_()
    decay = torch.where(future, g.new_zeros(()), g[:, :, None]).cumsum_(1).view(layout.length, layout.groups, -1, c, c)
    unseen = future.triu(1) if bounds is None else (future.triu(1) | bounds.other)[:, :, None]
    decay = decay.masked_fill_(unseen, float("-inf")).exp_().view(-1, c, c)
    carried = g.cumsum_(-1).exp_()
    if bounds is not None:
        view(problem, carried, heads).mul_(bounds.entering[:, :, None])
    enter = (rows.view(-1, 2, c) * carried[:, None]).view(-1, 2 * c)

    pairs = (grouped(decay, per_key)[:, :, None] * products.view(-1, 1, 2, c, c)).view(-1, 2 * c, c)
    pairs[:, :c].mul_(rows[:, :c, None])
    reads = (qk[:, None] * grouped(enter[..., None], per_key)).view(-1, 2 * c, width)
    return Chunks(qk, norm, rows, gain, carried, enter, decay[:, -1].clone(), decay, pairs, reads, scaled_v)


def view(problem: Problem, x: Tensor, heads: int) -> Tensor:
    """`[L, G, B, heads, ...]` of `[n, ...]`."""
    return x.unflatten(0, (problem.layout.length, problem.layout.groups, -1, heads))


def grouped(x: Tensor, per_key: int) -> Tensor:
    """`[m, Hv / Hk, ...]` of `[n, ...]`."""
    return x.unflatten(0, (-1, per_key))


def of_value_heads(x: Tensor, per_key: int) -> Tensor:
    """`[n, ...]` of `[m, ...]`, which are few numbers here."""
    return x if per_key == 1 else x.repeat_interleave(per_key, 0)
