"""Training attention: npu_fusion_attention, _v2 and _v3 with their gradients.

Source: torch_npu's operator documentation (npu_fusion_attention) and the CANN kernels (ops-transformer,
flash_attention_score). torch_npu's scaled_dot_product_attention ends in _v3.

Not simulated, and refused: sparse modes 5 to 8, pse_type 2 and 3, query_rope.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..refusal import FLOATS, require, require_dtype, require_same_dtype
from .attention_formula import Scores, attend, attend_backward
from .attention_layout import Layout, join, layout_of, split
from .attention_mask import UNLIMITED, Hidden, hidden_by
from .dropout import check_mask, draw_kept, packed
from .kernel import Kernel, OnHost

COPIES = 8  # softmax_max and softmax_sum hold each value eight times
MOST_HEADS = 256
WIDEST_HEAD = 768


@dataclass(frozen=True)
class Problem:
    """A checked call: what forward and backward have in common."""

    operator: str
    layout: Layout
    hidden: Hidden
    scale: float
    keep_prob: float
    pse: Tensor | None
    pse_last: bool
    sink: Tensor | None
    empty_rows_give_zero: bool
    packed_statistics: bool
    """softmax_max and softmax_sum are laid out [T, N, 8], not [N, T, 8] under that shape."""

    @property
    def probabilities(self) -> list[int]:
        """How many each sequence has: numels of the dropout mask is their sum."""
        lengths = zip(self.layout.query_lengths, self.layout.key_lengths, strict=True)
        return [self.layout.query_heads * queries * keys for queries, keys in lengths]

    def kept(self, seed: int, offset: int) -> tuple[Tensor | None, ...]:
        """The dropout mask of each sequence, flat [N * Sq * Skv]."""
        numbers = self.probabilities
        if self.keep_prob == 1:
            return (None,) * len(numbers)
        return draw_kept(sum(numbers), 1 - self.keep_prob, seed, offset).split(numbers)

    def scores(self, index: int, kept: Tensor | None) -> Scores:
        """For sequence `index`, with its part of the dropout mask."""
        queries, keys = self.layout.query_lengths[index], self.layout.key_lengths[index]
        heads = self.layout.query_heads
        if kept is not None:
            kept = kept.view(heads, queries, keys)
        pse = None
        if self.pse is not None:
            pse = self.pse[index if self.pse.shape[0] > 1 else 0]
        return Scores(
            self.scale,
            self.hidden.of(index, queries, keys),
            pse,
            self.pse_last,
            self.sink,
            kept,
            self.keep_prob,
            self.empty_rows_give_zero,
        )


def problem_of(
    operator: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None,
    padding_mask: Tensor | None,
    atten_mask: Tensor | None,
    scale: float,
    keep_prob: float,
    before: int,
    after: int,
    inner_precise: int,
    prefix: Sequence[int] | None,
    query_ends: Sequence[int] | None,
    key_ends: Sequence[int] | None,
    sparse_mode: int,
    softmax_layout: str,
    sink: Tensor | None,
    pse_type: int,
) -> Problem:
    require_same_dtype(operator, query=query, key=key, value=value)
    require_dtype(operator, "query", query, FLOATS)
    if pse is not None and pse_type in (0, 1):
        require_same_dtype(operator, query=query, pse=pse)
    require(padding_mask is None, operator, "padding_mask is not supported")
    require(prefix is None, operator, "prefix (sparse modes 5 and 6) is not simulated")
    require(pse_type in (0, 1), operator, f"pse_type {pse_type} is not simulated (0 and 1 are)")
    require(0 < keep_prob <= 1, operator, f"keep_prob must be in (0, 1], not {keep_prob}")
    require(inner_precise in (0, 1, 2), operator, f"inner_precise must be 0, 1 or 2, not {inner_precise}")
    _check_statistics(operator, softmax_layout, input_layout)
    input_layout = input_layout.upper()
    if input_layout != "TND":
        require(query_ends is None and key_ends is None, operator, f"actual_seq_qlen is for TND, not {input_layout}")
    layout = layout_of(operator, input_layout, query, key, value, head_num, query_ends, key_ends)
    require(1 <= head_num <= MOST_HEADS, operator, f"head_num must be 1 to {MOST_HEADS}, not {head_num}")
    require(
        1 <= layout.head_dim <= WIDEST_HEAD and layout.value_dim <= layout.head_dim,
        operator,
        f"D must be 1 to {WIDEST_HEAD} and at least Dv, not D={layout.head_dim}, Dv={layout.value_dim}",
    )
    for name, tensor in (("query", query), ("key", key)):
        require(tensor.numel() > 0, operator, f"{name} must not be empty (shape {list(tensor.shape)})")
    if pse is not None:
        _check_pse(operator, pse, layout)
    if sink is not None:
        require_dtype(operator, "sink", sink, (torch.float32,))
        require(tuple(sink.shape) == (head_num,), operator, f"sink must be [N] = [{head_num}], not {list(sink.shape)}")
    hidden = hidden_by(operator, layout, atten_mask, sparse_mode, before, after)
    zero = hidden.empty_rows_give_zero or inner_precise == 2
    return Problem(operator, layout, hidden, scale, keep_prob, pse, pse_type == 0, sink, zero, softmax_layout == "TND")


def _check_statistics(operator: str, softmax_layout: str, input_layout: str) -> None:
    require(softmax_layout in ("", "TND"), operator, f'softmax_layout must be "" or "TND", not {softmax_layout!r}')
    require(
        softmax_layout != "TND" or input_layout == "TND",  # compared before the case is made one
        operator,
        f"softmax_layout=TND only supported when input_layout=TND, not {input_layout}",
    )


def _check_pse(operator: str, pse: Tensor, layout: Layout) -> None:
    queries, keys = layout.longest
    allowed = [
        (layout.batch, layout.query_heads, queries, keys),
        (1, layout.query_heads, queries, keys),
        (layout.batch, layout.query_heads, 1, keys),
    ]
    require(layout.name != "TND", operator, "pse in TND is not simulated")
    require(
        tuple(pse.shape) in allowed,
        operator,
        f"pse must be [B,N,Sq,Skv], [1,N,Sq,Skv] or [B,N,1,Skv], one of {[list(s) for s in allowed]}, "
        f"not {list(pse.shape)}",
    )


def _forward(
    problem: Problem, query: Tensor, key: Tensor, value: Tensor, seed: int, offset: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """attention_out, softmax_max, softmax_sum, softmax_out (always empty)."""
    layout = problem.layout
    kept = problem.kept(seed, offset)
    outs, maxima, totals = [], [], []
    for index, (q, k, v) in enumerate(_sequences(problem, query, key, value)):
        out, maximum, total = attend(q, k, v, problem.scores(index, kept[index]))
        _leave_unwritten(problem, index, out)
        outs.append(out)
        maxima.append(maximum)
        totals.append(total)
    return (
        join(outs, layout.name),
        _join_statistics(problem, maxima),
        _join_statistics(problem, totals),
        query.new_empty(0, dtype=torch.float32),
    )


def backward(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    attention_in: Tensor,
    seed: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, dpse, dsink."""
    layout, heads = problem.layout, problem.layout.query_heads
    require_same_dtype(problem.operator, query=query, dy=dy)
    kept = problem.kept(seed, offset)
    gradients = split(dy, layout.name, heads, layout.query_lengths)
    outs = split(attention_in, layout.name, heads, layout.query_lengths)
    maxima = _split_statistics(problem, softmax_max)
    totals = _split_statistics(problem, softmax_sum)
    parts = [
        attend_backward(gradients[i], q, k, v, outs[i], maxima[i], totals[i], problem.scores(i, kept[i]))
        for i, (q, k, v) in enumerate(_sequences(problem, query, key, value))
    ]
    dpse = dsink = None
    if problem.pse is not None:
        dpse = (
            torch.stack([part.pse for part in parts if part.pse is not None])
            .sum_to_size(problem.pse.shape)
            .to(problem.pse.dtype)
        )
    if problem.sink is not None:
        dsink = torch.stack([part.sink for part in parts if part.sink is not None]).sum(0)
    name = layout.name
    return (
        join([part.query for part in parts], name),
        join([part.key for part in parts], name),
        join([part.value for part in parts], name),
        dpse,
        dsink,
    )


def _sequences(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    layout = problem.layout
    return list(
        zip(
            split(query, layout.name, layout.query_heads, layout.query_lengths),
            split(key, layout.name, layout.key_heads, layout.key_lengths),
            split(value, layout.name, layout.key_heads, layout.key_lengths),
            strict=True,
        )
    )


def _leave_unwritten(problem: Problem, index: int, out: Tensor) -> None:
    """Fully masked rows are undefined in TND: NaN."""
    if problem.layout.name != "TND":
        return
    hidden = problem.hidden.of(index, problem.layout.query_lengths[index], problem.layout.key_lengths[index])
    if hidden is not None and hidden.shape[-1]:
        out.masked_fill_(hidden.all(-1)[..., None], torch.nan)


def _join_statistics(problem: Problem, sequences: list[Tensor]) -> Tensor:
    """[N, Sq] of each sequence as [B, N, Sq, 8], or as the [T, N, 8] of TND."""
    if problem.layout.name != "TND":
        return torch.stack(sequences)[..., None].repeat(1, 1, 1, COPIES)
    by_head = torch.cat(sequences, 1)[..., None].repeat(1, 1, COPIES)
    if problem.packed_statistics:
        return by_head.transpose(0, 1).contiguous()
    return by_head.view(by_head.shape[1], by_head.shape[0], COPIES)


def _split_statistics(problem: Problem, statistics: Tensor) -> list[Tensor]:
    if problem.layout.name != "TND":
        return list(statistics[..., 0].unbind(0))
    total, heads, _ = statistics.shape
    if problem.packed_statistics:
        by_head = statistics[..., 0].transpose(0, 1)
    else:
        by_head = statistics.contiguous().view(heads, total, COPIES)[..., 0]
    return list(by_head.split(list(problem.layout.query_lengths), 1))


def _lengths(operator: str, name: str, lengths: Tensor | None) -> list[int] | None:
    """_v3 takes cumulative lengths as a CPU int64 tensor."""
    if lengths is None:
        return None
    require(
        lengths.dtype == torch.int64 and lengths.dim() == 1,
        operator,
        f"{name} must be a 1-D CPU int64 tensor, not {lengths.dtype} of shape {list(lengths.shape)}",
    )
    return lengths.tolist()


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = UNLIMITED,
    next_tockens: int = UNLIMITED,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
    *,
    draw: Callable[[], tuple[int, int]],
) -> tuple[Any, ...]:
    """`dropout(softmax(scale * (q @ k.mT + pse), masked)) @ v`, softmax in float32, rounded to the dtype before v.

    query, key, value: one dtype of float16, bfloat16, float32, in the layout that input_layout names (BSH, SBH, BNSD,
    BSND, or TND with cumulative host lengths); any strides. Key heads divide query heads (GQA). atten_mask: bool or
    uint8, 1 = masked, in exact shapes; without it sparse_mode is ignored and attention is full. A row with every key
    masked gives the mean of v with inner_precise 0, and 0 with inner_precise 2. dropout_mask: what
    _npu_dropout_gen_mask gives for seed and offset. Returns attention_out, softmax_max and softmax_sum (float32
    [B, N, Sq, 8]), an empty tensor, and seed, offset, numels of the dropout mask as integers.
    """
    name = "npu_fusion_attention"
    problem = problem_of(
        name, query, key, value, head_num, input_layout, pse=pse, padding_mask=padding_mask, atten_mask=atten_mask,
        scale=scale, keep_prob=keep_prob, before=pre_tockens, after=next_tockens, inner_precise=inner_precise,
        prefix=prefix, query_ends=actual_seq_qlen, key_ends=actual_seq_kvlen, sparse_mode=sparse_mode,
        softmax_layout=softmax_layout, sink=sink, pse_type=1,
    )  # fmt: skip
    return forward_with_integers(problem, query, key, value, dropout_mask, seed, offset, draw)


def forward_with_integers(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_mask: Tensor | None,
    seed: int,
    offset: int,
    draw: Callable[[], tuple[int, int]],
) -> tuple[Any, ...]:
    """The results and seed, offset, numels. numels counts the probabilities, whether there is dropout or not."""
    numels = sum(problem.probabilities)
    if dropout_mask is not None:
        check_mask(problem.operator, "dropout_mask", dropout_mask, numels)
        # Backward makes its mask of seed and offset again.
        require(
            problem.keep_prob == 1
            or torch.equal(dropout_mask, packed(draw_kept(numels, 1 - problem.keep_prob, seed, offset))),
            problem.operator,
            "dropout_mask must be made by _npu_dropout_gen_mask with p = 1 - keep_prob and the seed and offset given "
            f"beside it, {seed} and {offset}",
        )
    else:
        # The documentation says that seed is used without a mask, and op-plugin draws another over it.
        require(seed == 0 and offset == 0, problem.operator, "seed and offset need a dropout_mask that they have made")
        if problem.keep_prob < 1:
            seed, offset = draw()
            seed &= (1 << 63) - 1  # the schema has 64-bit signed integers
    return (*_forward(problem, query, key, value, seed, offset), seed, offset, numels)


def npu_fusion_attention_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None,
    padding_mask: Tensor | None,
    atten_mask: Tensor | None,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    softmax_in: Tensor | None,
    attention_in: Tensor,
    scale_value: float,
    keep_prob: float,
    pre_tockens: int,
    next_tockens: int,
    inner_precise: int,
    seed: int,
    offset: int,
    numels: int,
    prefix: list[int] | None,
    actual_seq_qlen: list[int] | None,
    actual_seq_kvlen: list[int] | None,
    sparse_mode: int,
    gen_mask_parallel: bool,
    sync: bool,
    softmax_layout: str,
    sink: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of npu_fusion_attention: dq, dk, dv, dpse, dsink (None where there was no pse or sink)."""
    problem = problem_of(
        "npu_fusion_attention_grad", query, key, value, head_num, input_layout, pse=pse, padding_mask=padding_mask,
        atten_mask=atten_mask, scale=scale_value, keep_prob=keep_prob, before=pre_tockens, after=next_tockens,
        inner_precise=inner_precise, prefix=prefix, query_ends=actual_seq_qlen, key_ends=actual_seq_kvlen,
        sparse_mode=sparse_mode, softmax_layout=softmax_layout, sink=sink, pse_type=1,
    )  # fmt: skip
    return backward(problem, query, key, value, dy, softmax_max, softmax_sum, attention_in, seed, offset)


def npu_fusion_attention_v3(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = UNLIMITED,
    next_tockens: int = UNLIMITED,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: Tensor | None = None,
    actual_seq_kvlen: Tensor | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    *,
    draw: Callable[[], tuple[int, int]],
) -> tuple[Any, ...]:
    """npu_fusion_attention with lengths as CPU int64 tensors; seed and offset come back as CPU int64 tensors [1]."""
    name = "npu_fusion_attention_v3"
    problem = problem_of(
        name, query, key, value, head_num, input_layout, pse=pse, padding_mask=padding_mask, atten_mask=atten_mask,
        scale=scale, keep_prob=keep_prob, before=pre_tockens, after=next_tockens, inner_precise=inner_precise,
        prefix=prefix, query_ends=_lengths(name, "actual_seq_qlen", actual_seq_qlen),
        key_ends=_lengths(name, "actual_seq_kvlen", actual_seq_kvlen), sparse_mode=sparse_mode,
        softmax_layout=softmax_layout, sink=sink, pse_type=1,
    )  # fmt: skip
    seed, offset = draw() if keep_prob < 1 else (0, 0)
    seed &= (1 << 63) - 1
    results = _forward(problem, query, key, value, seed, offset)
    return (*results, OnHost(torch.tensor([seed])), OnHost(torch.tensor([offset])))


def npu_fusion_attention_grad_v3(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None,
    padding_mask: Tensor | None,
    atten_mask: Tensor | None,
    softmax_max: Tensor,
    softmax_sum: Tensor,
    softmax_in: Tensor | None,
    attention_in: Tensor,
    scale_value: float,
    keep_prob: float,
    pre_tockens: int,
    next_tockens: int,
    inner_precise: int,
    seed: Tensor | None,
    offset: Tensor | None,
    prefix: list[int] | None,
    actual_seq_qlen: Tensor | None,
    actual_seq_kvlen: Tensor | None,
    sparse_mode: int,
    gen_mask_parallel: bool,
    sync: bool,
    softmax_layout: str,
    sink: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of npu_fusion_attention_v3: dq, dk, dv, dpse, dsink."""
    name = "npu_fusion_attention_grad_v3"
    problem = problem_of(
        name, query, key, value, head_num, input_layout, pse=pse, padding_mask=padding_mask, atten_mask=atten_mask,
        scale=scale_value, keep_prob=keep_prob, before=pre_tockens, after=next_tockens, inner_precise=inner_precise,
        prefix=prefix, query_ends=_lengths(name, "actual_seq_qlen", actual_seq_qlen),
        key_ends=_lengths(name, "actual_seq_kvlen", actual_seq_kvlen), sparse_mode=sparse_mode,
        softmax_layout=softmax_layout, sink=sink, pse_type=1,
    )  # fmt: skip
    state = (0, 0) if seed is None or offset is None else (int(seed), int(offset))
    return backward(problem, query, key, value, dy, softmax_max, softmax_sum, attention_in, *state)


V3_ON_HOST = ("actual_seq_qlen", "actual_seq_kvlen")

KERNELS = {
    "npu_fusion_attention": Kernel(npu_fusion_attention, draws=True),
    "npu_fusion_attention_grad": Kernel(npu_fusion_attention_grad),
    "npu_fusion_attention_v3": Kernel(npu_fusion_attention_v3, on_host=V3_ON_HOST, draws=True),
    "npu_fusion_attention_grad_v3": Kernel(npu_fusion_attention_grad_v3, on_host=(*V3_ON_HOST, "seed", "offset")),
}
