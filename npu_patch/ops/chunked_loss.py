"""Losses of a head's logits, chunk by chunk: neither the logits `[tokens, vocabulary]` nor their gradient ever exist.

A chunk is some rows of all columns. Where a whole loss is asked for, its gradients are computed in the forward, while
the chunk is there, so the head is multiplied as often as without chunks: once, and once per gradient. Log-probabilities
of tokens, whose gradients are not known by then, and losses in float16, whose gradients need the loss scale, make each
chunk again in the backward.

Everything is rounded where the whole is: gradients of rows are a product for each chunk, and those of weights in half
precision one for each block of columns, over all rows, for which the logits are made once more. Weights in float32 add
up over the chunks. Under a frozen head there is no gradient but that of its rows.

Where there is a tensor that stands for the logits, and somebody asks for its gradient, that is made as a whole, and the
others follow from it.

The same bits with gradients and without. A loss that is scaled afterwards by what is no power of two (gradient
accumulation by hand) has gradients that are rounded once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.selective_checkpointing import unseen
from npu_patch.ops.differentiated_once import differentiated_once
from npu_patch.ops.head_products import ALL, Expression, Logits, Term, logits_of
from npu_patch.ops.token_losses import IN_ONE_PASS, TokenLosses, of_logits

ELEMENTS = 2**26  # of a chunk: two float32 and two bfloat16 copies of it take 0.8 GB
MULTIPLE = 16  # rows or columns that a device's matrix unit takes at once
HALF_DTYPES = (torch.bfloat16, torch.float16)


def chunks(length: int, width: int) -> list[slice]:
    """Equal parts of `length` rows (or columns) with at most ELEMENTS elements, or MULTIPLE rows, each."""
    number = max(-(-length // max(ELEMENTS // max(width, 1), MULTIPLE)), 1)
    each = max(-(-length // (number * MULTIPLE)), 1) * MULTIPLE
    return [slice(start, min(start + each, length)) for start in range(0, max(length, 1), each)]


@dataclass(frozen=True)
class StandIn:
    """`tensor`: autograd's, of which logits are known; `heard()`: whether somebody listens to its gradient."""

    tensor: Tensor
    heard: Callable[[], bool]


def _wanted_whole(ctx: Any) -> Tensor | None:
    """In a backward: the logits, if their gradient is wanted. Asked once, as what stands for them keeps alive what they
    are made of."""
    stand_in, ctx.stand_in = ctx.stand_in, None
    if stand_in is None or not stand_in.tensor.requires_grad:
        return None
    nodes = [node for node, _ in ctx.next_functions[1:] if node is not None]  # the first is that of the stand-in
    return stand_in.tensor.detach() if stand_in.heard() or not any(map(_asked_for, nodes)) else None


def _asked_for(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad of this very leaf
        return True


def cross_entropy(
    logits: Logits,
    labels: Tensor,
    token_losses: TokenLosses,
    *,
    stand_in: StandIn | None = None,
    ignore_index: int = -100,
    divisor: Tensor | float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`F.cross_entropy` of float32 logits: the sum over labels that are not `ignore_index`, divided by `divisor`, or
    by their number. `labels`: int64, one for each row."""
    logits, labels = _flat(logits, labels)
    if any(term.rows.dtype == torch.float16 for term in logits.terms):  # gradients before GradScaler's factor underflow
        valid = labels != ignore_index
        plan = _OfLabels.of(logits, stand_in, token_losses, labels.masked_fill(~valid, 0))
        (of_tokens,) = _Chosen.apply(plan, False, label_smoothing, plan.autograds, *logits.tensors)
        total = torch.where(valid, -of_tokens, 0.0).sum()
        return total / (valid.sum() if divisor is None else divisor)
    plan = _OfLabels.of(logits, stand_in, token_losses, labels)
    return _CrossEntropy.apply(plan, ignore_index, divisor, label_smoothing, plan.autograds, *logits.tensors)


def chosen(
    logits: Logits,
    labels: Tensor,
    token_losses: TokenLosses,
    entropy: bool = False,
    stand_in: StandIn | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log_softmax of float32 logits at the labels, in their shape, and the entropy of each row. `labels`: int64, one
    for each row, each of the vocabulary."""
    shape = labels.shape
    logits, labels = _flat(logits, labels)
    plan = _OfLabels.of(logits, stand_in, token_losses, labels)
    found = _Chosen.apply(plan, entropy, 0.0, plan.autograds, *logits.tensors)
    return found[0].view(shape), found[1].view(shape) if entropy else None


def _flat(logits: Logits, labels: Tensor) -> tuple[Logits, Tensor]:
    if labels.numel() != logits.rows:
        raise ValueError(f"{labels.numel()} labels for {logits.rows} rows of logits: one for each is accepted")
    return flat(logits), labels.reshape(-1)


def flat(logits: Logits) -> Logits:
    return logits.with_rows(lambda rows: rows.reshape(-1, rows.shape[-1]))


@dataclass(frozen=True)
class Plan:
    """What one autograd function computes of `logits`, which are detached. `wanted`: of each tensor of theirs, whether
    it gets a gradient."""

    logits: Logits
    wanted: tuple[bool, ...]
    stand_in: StandIn | None

    @classmethod
    def of(cls, logits: Logits, stand_in: StandIn | None, *rest: Any) -> Any:
        with_grad = torch.is_grad_enabled()
        wanted = tuple(with_grad and each is not None and each.requires_grad for each in logits.tensors)
        return cls(logits.detached(), wanted, stand_in, *rest)

    @property
    def autograds(self) -> Tensor | None:
        return None if self.stand_in is None else self.stand_in.tensor


@dataclass(frozen=True)
class _OfLabels(Plan):
    token_losses: TokenLosses
    labels: Tensor


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: _OfLabels,
        ignore_index: int,
        divisor: Any,
        smoothing: float,
        stand_in: Tensor | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        logits, labels = plan.logits, plan.labels
        valid = labels != ignore_index
        labels = labels.masked_fill(~valid, 0)
        divisor = valid.sum() if divisor is None else divisor
        by = divisor if isinstance(divisor, Tensor) else labels.new_full((), divisor, dtype=torch.float32)
        scale = torch.where(valid, 1.0 / by, 0.0)  # no token: none has a gradient
        gradients, even = _Gradients(logits, plan.wanted), (smoothing, logits.vocabulary)
        losses, normalizers = [], []
        in_one_pass = plan.token_losses in IN_ONE_PASS and any(plan.wanted) and not smoothing
        with unseen(), torch.autocast(logits.device.type, enabled=False):
            for rows in gradients.chunks:
                computed, kept = logits.computed(rows)
                if in_one_pass:
                    of_tokens, grad = plan.token_losses(computed, labels[rows], scale[rows])
                    if gradients.blocks:
                        normalizers.append(computed.gather(-1, labels[rows, None]).squeeze(-1).float() + of_tokens)
                    del computed
                    losses.append(of_tokens)
                    gradients.add_rows(rows, grad, kept)
                    continue
                full, dtype = computed.float(), computed.dtype
                del computed  # of the size of a chunk, as each of these
                of_tokens, log_probabilities = plan.token_losses(full, labels[rows])
                if gradients.blocks:
                    normalizers.append(full.gather(-1, labels[rows, None]).squeeze(-1) + of_tokens)
                del full
                losses.append(_smoothed(of_tokens, log_probabilities, smoothing))
                if any(plan.wanted):
                    grad = of_logits(log_probabilities, labels[rows], scale[rows], None, *even)
                    gradients.add_rows(rows, grad.to(dtype), kept)
            if gradients.blocks:
                of_rows = torch.cat(normalizers)[:, None]
                for columns in gradients.blocks:
                    computed, kept = logits.computed(ALL, columns)
                    grad = of_logits(computed.float() - of_rows, labels, scale, columns.start, *even)
                    gradients.add_columns(columns, grad.to(computed.dtype), kept)
        ctx.stand_in, ctx.smoothing = plan.stand_in, smoothing
        ctx.save_for_backward(*gradients.found, labels, scale)
        return torch.where(valid, torch.cat(losses), 0.0).sum() / divisor

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        *found, labels, scale = ctx.saved_tensors
        whole = _wanted_whole(ctx)
        if whole is None:
            return None, None, None, None, None, *(_scaled(each, grad) for each in found)
        log_probabilities = whole.reshape(-1, whole.shape[-1]).float().log_softmax(-1)
        of_whole = of_logits(log_probabilities, labels, scale * grad, None, ctx.smoothing, whole.shape[-1])
        return None, None, None, None, of_whole.to(whole.dtype).view(whole.shape), *(None for _ in found)


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: _OfLabels, entropy: bool, smoothing: float, stand_in: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        logits, labels = plan.logits, plan.labels
        found, normalizers, entropies = [], [], []
        with unseen(), torch.autocast(logits.device.type, enabled=False):
            for rows in chunks(logits.rows, logits.vocabulary):
                full = logits.computed(rows)[0].float()
                of_tokens, log_probabilities = plan.token_losses(full, labels[rows])
                normalizers.append(full.gather(-1, labels[rows, None]).squeeze(-1) + of_tokens)
                found.append(-_smoothed(of_tokens, log_probabilities, smoothing))
                if entropy:
                    entropies.append(-(log_probabilities.exp().mul_(log_probabilities)).sum(-1))
        of_rows = torch.cat(entropies) if entropy else None
        ctx.vocabulary, ctx.smoothing = logits.vocabulary, smoothing
        keep(ctx, plan, tensors, labels, torch.cat(normalizers), of_rows)
        return (torch.cat(found),) if of_rows is None else (torch.cat(found), of_rows)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad: Tensor | None, of_entropy: Tensor | None = None) -> Any:
        labels, normalizers, entropies, *tensors = ctx.saved_tensors
        scale = torch.zeros_like(normalizers) if grad is None else -grad

        def of_part(computed: Tensor, rows: slice, start: int | None) -> Tensor:
            log_probabilities = computed.float() - normalizers[rows, None]
            extra = None
            if of_entropy is not None:
                extra = (log_probabilities + entropies[rows, None]).mul_(of_entropy[rows, None])
                extra = extra.mul_(log_probabilities.exp())
            even = ctx.smoothing, ctx.vocabulary
            found = of_logits(log_probabilities, labels[rows], scale[rows], start, *even)
            return (found if extra is None else found.sub_(extra)).to(computed.dtype)

        return None, None, None, *gradients_again(ctx, tensors, of_part)


def keep(ctx: Any, plan: Plan, tensors: Sequence[Tensor | None], *saved: Tensor | None) -> None:
    """`saved`, and the logits' `tensors`, and what else `gradients_again` needs."""
    ctx.expression, ctx.wanted, ctx.stand_in = plan.logits.expression, plan.wanted, plan.stand_in
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved, *tensors)


def gradients_again(
    ctx: Any, tensors: Sequence[Tensor], of_part: Callable[[Tensor, slice, int | None], Tensor]
) -> tuple[Tensor | None, ...]:
    """Of what stands for the logits, and of each of their `tensors`. `of_part(computed, rows, start)`: the gradient of
    logits `computed` of some rows, from the column `start` on where they are not all."""
    whole = _wanted_whole(ctx)
    if whole is not None:
        of_whole = of_part(whole.reshape(-1, whole.shape[-1]), ALL, None).view(whole.shape)
        return of_whole, *(None for _ in tensors)
    logits = logits_of(ctx.expression, tensors)
    gradients = _Gradients(logits, ctx.wanted)
    with torch.autocast(logits.device.type, enabled=False):
        for rows in gradients.chunks:
            computed, kept = logits.computed(rows)
            gradients.add_rows(rows, of_part(computed, rows, None), kept)
        for columns in gradients.blocks:
            computed, kept = logits.computed(ALL, columns)
            gradients.add_columns(columns, of_part(computed, ALL, columns.start), kept)
    return None, *gradients.found


def _smoothed(losses: Tensor, log_probabilities: Tensor, smoothing: float) -> Tensor:
    if not smoothing:
        return losses
    shares = log_probabilities.sum(-1) * (smoothing / log_probabilities.shape[-1])
    return losses * (1 - smoothing) - shares


@dataclass
class _Gradients:
    """Of the terms of logits, from that of the logits: by chunks of rows; of weights in half precision, of which each
    chunk's would be rounded, by blocks of columns."""

    logits: Logits
    wanted: Sequence[bool]
    chunks: list[slice] = field(init=False)
    blocks: list[slice] = field(init=False)
    found: list[Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        logits = self.logits
        self.chunks = chunks(logits.rows, logits.vocabulary)
        of_columns = list(zip(logits.tensors, self.wanted, strict=True))
        del of_columns[::3]  # a term's rows come first
        half = any(wanted and tensor is not None and tensor.dtype in HALF_DTYPES for tensor, wanted in of_columns)
        self.blocks = chunks(logits.vocabulary, logits.rows) if half and len(self.chunks) > 1 else []
        self.found = [None] * len(self.wanted)

    def add_rows(self, rows: slice, grad: Tensor, kept: dict[Expression, Any]) -> None:
        for at, term, of_product in self._products(grad, kept):
            for_rows, for_weight, for_bias = self.wanted[at : at + 3]
            if for_rows:
                into = self._buffer(at, term.rows)
                torch.mm(of_product, term.weight, out=into[rows])
            if for_weight and not self.blocks:
                self._add_product(at + 1, of_product.t(), term.rows[rows])
            if for_bias and not self.blocks:
                self._add(at + 2, of_product.sum(0))

    def add_columns(self, columns: slice, grad: Tensor, kept: dict[Expression, Any]) -> None:
        for at, term, of_product in self._products(grad, kept):
            _, for_weight, for_bias = self.wanted[at : at + 3]
            if for_weight:
                torch.mm(of_product.t(), term.rows, out=self._buffer(at + 1, term.weight)[columns])
            if for_bias and term.bias is not None:
                self._buffer(at + 2, term.bias)[columns] = of_product.sum(0)

    def _products(self, grad: Tensor, kept: dict[Expression, Any]) -> list[tuple[int, Term, Tensor]]:
        into: dict[int, Tensor] = {}
        self.logits.expression.gradient(grad, kept, into)
        return [(3 * number, term, into[number]) for number, term in enumerate(self.logits.terms)]

    def _buffer(self, at: int, like: Tensor) -> Tensor:
        found = self.found[at]
        if found is None:
            found = self.found[at] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return found

    def _add(self, at: int, part: Tensor) -> None:
        found = self.found[at]
        self.found[at] = part if found is None else found.add_(part)

    def _add_product(self, at: int, left: Tensor, right: Tensor) -> None:
        found = self.found[at]
        self.found[at] = left @ right if found is None else found.addmm_(left, right)


def _scaled(gradient: Tensor | None, by: Tensor) -> Tensor | None:
    """In float32, rounded once: a 0-dimensional factor would take the gradient's dtype first."""
    if gradient is None or gradient.dtype not in HALF_DTYPES:
        return None if gradient is None else gradient * by
    scaled = torch.empty_like(gradient)
    for part in chunks(gradient.shape[0], gradient[0].numel()):
        scaled[part] = gradient[part].float() * by
    return scaled
