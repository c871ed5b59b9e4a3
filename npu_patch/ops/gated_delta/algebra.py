"""The gated delta rule over chunks: its forward, and its backward from the arguments alone.

For one head, with state S `[K, V]`, decay g, q and k of any norm, and q already scaled (https://arxiv.org/abs/2412.06464):

    S_t = exp(g_t) S_t-1 + k_t (beta_t (v_t - exp(g_t) S_t-1^T k_t))^T        o_t = S_t^T q_t

Within a chunk of C tokens (https://arxiv.org/abs/2406.06484), let c be the sum of g from the chunk's first token,
D_ij = exp(c_i - c_j) for j <= i and else 0, and S the state that enters. The values that are written, and with them
everything else, come of one triangular inverse T = (I + strictly lower(beta k k^T D))^-1:

    E = beta v - beta exp(c) k S        V = T E        o = exp(c) q S + (q k^T D) V
    S' = exp(c_C) S + K^T V  with  K = exp(c_C - c) k

which is linear in S: S' = M S + R with X = K^T T, M = exp(c_C) I - X beta exp(c) k and R = X beta v, so M and R of all
chunks are made at once and the states by a scan (chunk_scan.py). Only differences of c that are not positive are ever
exponentiated. How q and k are normalized in passing: chunks.py.

The backward follows from dV = (q k^T D)^T do + K dS' and Y = T^T dV, the gradient of E: the gradient of the inverse is
dT = dV E^T, so that of I + A is -T^T dT T^T = -Y V^T, and no product with T is left. The state's is
dS = M^T dS' + (exp(c) q)^T do - (beta exp(c) k)^T T^T (q k^T D)^T do: the transposed scan.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from npu_patch.ops.gated_delta.chunk_scan import scan_backward, scan_forward
from npu_patch.ops.gated_delta.chunks import Chunks, Problem, grouped, make_chunks, of_value_heads, view
from npu_patch.ops.gated_delta.triangular_inverse import unit_lower_inverse


class Kept(NamedTuple):
    """What the backward does not make again: the inverses T `[n, C, C]` and, where groups have several chunks, the
    states that enter the groups `[G, Z, K, V]`, for Z heads of the batch."""

    inverse: Tensor
    entering_groups: Tensor | None


def forward(problem: Problem, wants_final: bool, wants_kept: bool) -> tuple[Tensor, Tensor | None, Kept | None]:
    """o `[B, T, Hv, V]` in the dtype of q; the final states `[N, Hv, K, V]`; what `backward` is to be given."""
    chunks = make_chunks(problem)
    c = problem.layout.chunk
    ends = _Ends(problem, chunks) if wants_final and problem.bounds is not None else None
    inverse = _inverse(chunks)
    erase = _erase(problem, chunks, inverse)
    del chunks.qk, chunks.decay  # memory peaks in what follows
    transitions, states = _steps(problem, chunks, erase)
    del erase
    scan_forward(transitions, states)
    del transitions
    kept = None
    if wants_kept:
        kept = Kept(inverse, states[0].clone() if problem.layout.length > 1 else None)
    final = states[-1, -1].clone() if wants_final and ends is None else None
    entering = states[:-1].view(-1, *states.shape[-2:])
    written = torch.bmm(inverse, chunks.scaled_v.baddbmm_(chunks.reads[:, c:], entering))
    o = torch.bmm(chunks.reads[:, :c], entering).baddbmm_(chunks.pairs[:, :c], written)
    if ends is not None:
        final = ends.states(states, written)
    if final is not None:
        final = final.view(-1, problem.v.shape[2], *final.shape[-2:])
    return _tokens(problem, o, problem.v.shape[2], problem.q.dtype), final, kept


def backward(
    problem: Problem, kept: Kept, do: Tensor | None, d_final: Tensor | None, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, g, beta and initial_state, each in its dtype, of those that `needs` names."""
    needs_q, needs_k, needs_v, needs_g, needs_beta, needs_state = needs
    chunks = make_chunks(problem)
    c, inverse = problem.layout.chunk, kept.inverse
    erase = _erase(problem, chunks, inverse)
    transitions, states = _steps(problem, chunks, erase)
    if kept.entering_groups is not None:
        states[0].copy_(kept.entering_groups)
    scan_forward(transitions, states, groups_known=kept.entering_groups is not None)
    entering = states[:-1].view(-1, *states.shape[-2:])
    written = torch.bmm(inverse, chunks.scaled_v.baddbmm_(chunks.reads[:, c:], entering))
    del chunks.scaled_v

    d_out = _output_gradient(problem, do, len(inverse))
    d_written = torch.bmm(chunks.pairs[:, :c].mT, d_out[:, :c])
    ends = None if d_final is None or problem.bounds is None else _Ends(problem, chunks)
    if ends is not None and d_final is not None:
        ends.remember(states, written)
        ends.add_written_gradient(d_written, d_final)
    torch.bmm(inverse.mT, d_written, out=d_out[:, c:])
    del d_written
    d_states = _state_gradients(chunks, states, d_out, ends, d_final)
    scan_backward(transitions, d_states)
    d_initial = None
    if needs_state and problem.initial_state is not None:
        d_initial = d_states[0, 0].view(problem.initial_state.shape).to(problem.initial_state.dtype)
    del transitions
    d_leaving = d_states[1:].view_as(entering)
    d_out[:, c:].baddbmm_(erase, d_leaving)
    del erase

    local = _Local(problem, chunks)
    d_keys = torch.bmm(written, d_leaving.mT) if needs_k or needs_g else None  # of K
    d_reads = torch.bmm(d_out, entering.mT) if needs_q or needs_k or needs_g or needs_beta else None
    if needs_g:
        local.d_carry = entering.mul_(d_leaving).sum((-1, -2))
    del states, entering, d_states, d_leaving
    if d_reads is not None:
        local.add_pairs(torch.bmm(d_out, written.mT))
        local.add_reads(d_reads)
    if d_keys is not None:
        local.add_keys(d_keys)
    if ends is not None and d_reads is not None:
        ends.add_local_gradient(local)
    del written, d_reads, d_keys
    dg = _tokens(problem, local.dg(), problem.v.shape[2], problem.g.dtype) if needs_g else None
    dq = dk = None
    if needs_q or needs_k:
        d_qk = local.d_qk_unnormalized()
        dq = _tokens(problem, d_qk[:, :c], problem.q.shape[2], problem.q.dtype) if needs_q else None
        dk = _tokens(problem, d_qk[:, c:], problem.k.shape[2], problem.k.dtype) if needs_k else None
        del d_qk
    dv, d_beta = _value_gradients(problem, chunks, local, d_out[:, c:], needs_v, needs_beta)
    return dq, dk, dv, dg, d_beta, d_initial


def _output_gradient(problem: Problem, do: Tensor | None, chunks: int) -> Tensor:
    """`[n, 2 C, V]`, of which the first half is that of o, and the second has room for Y."""
    c = problem.layout.chunk
    d_out = problem.empty(chunks, 2 * c, problem.v.shape[-1])
    if do is None:
        d_out[:, :c].zero_()
    else:
        view(problem, d_out[:, :c], do.shape[2]).copy_(problem.layout.chunked(do))
    return d_out


def _state_gradients(
    chunks: Chunks, states: Tensor, d_out: Tensor, ends: _Ends | None, d_final: Tensor | None
) -> Tensor:
    """As `scan_backward` wants them: what each chunk adds, and what is known of the last. Frees `chunks.reads`."""
    d_states = torch.empty_like(states)
    torch.bmm(chunks.reads.mT, d_out, out=d_states[:-1].view(-1, *states.shape[-2:]))
    del chunks.reads
    if ends is not None:
        ends.add_state_gradient(d_states)
    if d_final is not None and ends is None:
        d_states[-1, -1].copy_(d_final.flatten(0, 1))
    else:
        d_states[-1, -1].zero_()
    return d_states


def _value_gradients(
    problem: Problem, chunks: Chunks, local: _Local, dy: Tensor, needs_v: bool, needs_beta: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of v and beta, from Y."""
    if not (needs_v or needs_beta):
        return None, None
    c, (_, per_key), heads = problem.layout.chunk, problem.heads, problem.v.shape[2]
    by_value = torch.empty_like(dy, memory_format=torch.contiguous_format)
    dv = d_beta = None
    if needs_beta:
        torch.mul(view(problem, dy, heads), problem.layout.chunked(problem.v), out=view(problem, by_value, heads))
        d_beta = by_value.sum(-1)
        if chunks.norm is None:
            d_beta += local.d_strength
        else:
            norm = of_value_heads(chunks.norm[:, c:], per_key)
            d_beta.addcmul_(local.d_strength, norm).mul_(norm)
        d_beta = _tokens(problem, d_beta, heads, problem.beta.dtype)
    if needs_v:
        torch.mul(dy, chunks.gain[..., None], out=by_value)
        dv = _tokens(problem, by_value, heads, problem.v.dtype)
    return dv, d_beta


class _Local:
    """The gradients of q, k, c and beta, gathered from what a chunk computes of them.

    Each product has k or q times a factor of c or beta, so that `x dx`, summed over the width, serves the norm, c and
    beta alike. `plus` `[n, 2 C]` is that of q and of k where c enters with a plus, `minus` `[n, C]` that of k where it
    enters with a minus.
    """

    d_carry: Tensor

    def __init__(self, problem: Problem, chunks: Chunks) -> None:
        self.problem, self.chunks = problem, chunks
        chunks.qk = chunks.qk.to(problem.dtype)
        self.c, (_, self.per_key) = problem.layout.chunk, problem.heads
        self.at_ends: Tensor | None = None

    def add_pairs(self, d_pairs: Tensor) -> None:
        c, chunks = self.c, self.chunks
        d_pairs[:, c:].diagonal(dim1=-2, dim2=-1).zero_()  # A is strictly lower; D has the rest of the triangle
        by_pair = d_pairs * chunks.pairs
        self.plus = by_pair.sum(-1)
        self.d_strength = self.plus[:, c:].neg()
        signed = torch.ones_like(self.plus)  # the q rows of `pairs` have their factor
        signed[:, c:] = chunks.rows[:, c:]
        self.plus.mul_(signed)
        self.minus = torch.bmm(signed[:, None], by_pair).squeeze(1)
        del by_pair
        d_pairs.view(-1, 2, c, c).mul_(chunks.decay[:, None])
        d_pairs = _over_key_heads(d_pairs.mul_(chunks.rows[..., None]), self.per_key)
        self.d_qk = torch.bmm(d_pairs, chunks.qk[:, c:])
        self.d_qk[:, c:].baddbmm_(d_pairs.mT, chunks.qk)

    def add_reads(self, d_reads: Tensor) -> None:
        by_read = (grouped(d_reads, self.per_key) * self.chunks.qk[:, None]).sum(-1).view(-1, 2 * self.c)
        self.d_strength.addcmul_(by_read[:, self.c :], self.chunks.carried, value=-1)
        self.plus.addcmul_(by_read, self.chunks.enter)
        _add_over_key_heads(self.d_qk, d_reads, self.chunks.enter, self.per_key)

    def add_keys(self, d_keys: Tensor) -> None:
        by_key = (grouped(d_keys, self.per_key) * self.chunks.qk[:, None, self.c :]).sum(-1).view(-1, self.c)
        by_key = by_key.mul_(self.chunks.leave)
        self.minus += by_key
        self.last = by_key.sum(-1)
        _add_over_key_heads(self.d_qk[:, self.c :], d_keys, self.chunks.leave, self.per_key)

    def dg(self) -> Tensor:
        d_cumulative = self.plus[:, : self.c] + self.plus[:, self.c :] - self.minus
        d_cumulative[:, -1] += torch.addcmul(self.last, self.d_carry, self.chunks.carried[:, -1])
        if self.at_ends is not None:
            d_cumulative += self.at_ends
        return d_cumulative.flip(-1).cumsum(-1).flip(-1)

    def d_qk_unnormalized(self) -> Tensor:
        if self.chunks.norm is None:
            return self.d_qk
        self.plus[:, self.c :] += self.minus
        along = _over_key_heads(self.plus, self.per_key) * self.chunks.norm.square()
        return self.d_qk.addcmul_(self.chunks.qk, along[..., None], value=-1)


def _inverse(chunks: Chunks) -> Tensor:
    c = chunks.decay.shape[-1]
    return unit_lower_inverse(chunks.pairs[:, c:] * chunks.rows[:, c:, None].neg())


def _erase(problem: Problem, chunks: Chunks, inverse: Tensor) -> Tensor:
    """X^T `[n, C, K]`."""
    c, (_, per_key) = problem.layout.chunk, problem.heads
    keys = chunks.qk[:, None, c:] * grouped(chunks.leave[..., None], per_key)
    return torch.bmm(inverse.mT, keys.view(-1, c, keys.shape[-1]))


def _steps(problem: Problem, chunks: Chunks, erase: Tensor) -> tuple[Tensor, Tensor]:
    """M `[L, G, Z, K, K]`, and R with the first state as `scan_forward` wants them."""
    layout, c, width = problem.layout, problem.layout.chunk, problem.k.shape[-1]
    z = problem.v.shape[0] * problem.v.shape[2]
    transitions = torch.bmm(erase.mT, chunks.reads[:, c:])
    transitions.diagonal(dim1=-2, dim2=-1).add_(chunks.carried[:, -1:])
    transitions = transitions.view(layout.length, layout.groups, z, width, width)
    states = problem.empty(layout.length + 1, layout.groups, z, width, problem.v.shape[-1])
    torch.bmm(erase.mT, chunks.scaled_v, out=states[1:].view(-1, *states.shape[-2:]))
    if problem.initial_state is None:
        states[0, 0].zero_()
    else:
        states[0, 0].copy_(problem.initial_state.flatten(0, 1))
    return transitions, states


class _Ends:
    """The states at the ends of packed sequences: with e the last token of one, in a chunk entered by S,
    exp(c_e) S + sum over its tokens i of D_ei k_i V_i^T."""

    def __init__(self, problem: Problem, chunks: Chunks) -> None:
        assert problem.bounds is not None
        self.bounds, self.layout = problem.bounds, problem.layout
        _, self.per_key = problem.heads
        self.entering = self._at_end(chunks.carried)  # [N, Z]
        self.row = self._at_end(chunks.decay)  # [N, Z, C]
        keys = self._of_chunk(chunks.qk[:, self.layout.chunk :])  # [N, m, C, K]
        self.keys = keys.repeat_interleave(self.per_key, 1) if self.per_key > 1 else keys
        self.weighted = self.keys * self.row[..., None]

    def _of_chunk(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.layout.chunks, -1)).index_select(0, self.bounds.last_chunk)

    def _at_end(self, x: Tensor) -> Tensor:
        x, slot = self._of_chunk(x), self.bounds.last_slot
        return x.gather(2, slot.view(-1, *[1] * (x.dim() - 1)).expand(-1, x.shape[1], 1, *x.shape[3:])).squeeze(2)

    def _scatter(self, x: Tensor, added: Tensor) -> None:
        x.unflatten(0, (self.layout.chunks, -1)).index_add_(0, self.bounds.last_chunk, added)

    def _filled(self, x: Tensor) -> Tensor:
        return x * self.bounds.filled.view(-1, 1, 1, 1)

    def states(self, states: Tensor, written: Tensor) -> Tensor:
        """`[N, Z, K, V]`, from the states that enter the chunks and the values written in them."""
        self.remember(states, written)
        return self._filled(self.entered * self.entering[..., None, None] + self.weighted.mT @ self.written)

    def add_written_gradient(self, d_written: Tensor, d_final: Tensor) -> None:
        self.d_final = self._filled(d_final)
        self._scatter(d_written, self.weighted @ self.d_final)

    def add_state_gradient(self, d_states: Tensor) -> None:
        self._scatter(d_states[:-1].flatten(0, 2), self.d_final * self.entering[..., None, None])

    def add_local_gradient(self, local: _Local) -> None:
        d_weighted = self.written @ self.d_final.mT
        by_token = (d_weighted * self.weighted).sum(-1)
        self._scatter(local.minus, by_token)
        at_end = (self.entered * self.d_final).sum((-1, -2)) * self.entering + by_token.sum(-1)
        slots = torch.zeros_like(by_token)
        slots.scatter_(-1, self.bounds.last_slot.view(-1, 1, 1).expand(*slots.shape[:2], 1), at_end[..., None])
        local.at_ends = torch.zeros_like(local.minus)
        self._scatter(local.at_ends, slots)
        d_keys = (d_weighted * self.row[..., None]).unflatten(1, (-1, self.per_key)).sum(2)
        self._scatter(local.d_qk[:, self.layout.chunk :], d_keys)

    def remember(self, states: Tensor, written: Tensor) -> None:
        """What the gradients at the ends need of the states and of the values written."""
        self.entered, self.written = self._of_chunk(states[:-1].flatten(0, 2)), self._of_chunk(written)


def _tokens(problem: Problem, x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return problem.layout.tokenwise(view(problem, x, heads), dtype)


def _over_key_heads(x: Tensor, per_key: int) -> Tensor:
    """`[m, ...]` of `[n, ...]`: the sum over the value heads of each key head."""
    return x if per_key == 1 else x.unflatten(0, (-1, per_key)).sum(1)


def _add_over_key_heads(total: Tensor, x: Tensor, rows: Tensor, per_key: int) -> None:
    """To `[m, rows, K]`, `[n, rows, K]` times `[n, rows]`: over the value heads of each key head."""
    for of_head, factor in zip(grouped(x, per_key).unbind(1), grouped(rows[..., None], per_key).unbind(1), strict=True):
        total.addcmul_(of_head, factor)
