"""Attention without gradients: npu_fused_infer_attention_score, its _v2, npu_prompt_ and npu_incre_flash_attention.

Source: torch_npu's operator documentation. None of them has a derivative.

Not simulated, and refused: quantised inputs, query_rope, shared prefixes, padding sizes, pages with TND, and the
layouts that change between input and output except BNSD_BSND.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..refusal import HALF, require, require_contiguous, require_dtype, require_same_dtype
from .attention_formula import Scores, attend
from .attention_layout import Layout, join, layout_of, split
from .attention_mask import COMPRESSED, SPARSE_MODES, UNLIMITED, outside_band, upper_triangle
from .kernel import Kernel
from .paged_attention import Paged, length_of

COMPRESSED_MODES = (2, 3, 4)  # their mask is no matrix of queries and keys
MOST_HEADS = 256
LARGEST_GROUP = 64
WIDEST_HEAD = 512


@dataclass(frozen=True)
class Call:
    """The arguments that the operators share, under one name each."""

    operator: str
    layout: str
    heads: int
    key_heads: int
    """0: as many as heads."""
    scale: float
    mask: Tensor | None = None
    sparse_mode: int = 0
    before: int = UNLIMITED
    after: int = UNLIMITED
    inner_precise: int = 0
    query_lengths: Sequence[int] | None = None
    """TND: cumulative ends; else the length of each entry of the batch. Rows beyond it are unwritten (NaN here)."""
    key_lengths: Sequence[int] | None = None
    block_table: Tensor | None = None
    block_size: int = 0
    sink: Tensor | None = None
    bias: Tensor | None = None


def infer(call: Call, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """out in query's layout (BNSD_BSND: in BSND), and lse float32 [B, N, Sq, 1] or [T, N, 1]."""
    name = call.operator
    require_same_dtype(name, query=query, key=key, value=value)
    require_dtype(name, "query", query, HALF)
    for argument, tensor in (("query", query), ("key", key), ("value", value)):
        require_contiguous(name, argument, tensor)
    require(call.inner_precise in range(4), name, f"inner_precise must be 0 to 3, not {call.inner_precise}")
    require(call.sparse_mode in SPARSE_MODES, name, f"sparse_mode must be 0 to 4, not {call.sparse_mode}")
    layout_in = "BNSD" if call.layout == "BNSD_BSND" else call.layout
    layout_out = "BSND" if call.layout == "BNSD_BSND" else call.layout
    key_heads = call.key_heads or call.heads
    if call.block_table is not None:
        paged = Paged(name, call.block_table, call.block_size, call.key_lengths, layout_in, key_heads)
        paged.check(query, key, value)
        key, value = paged.gathered(key), paged.gathered(value)
        mask = call.mask if call.sparse_mode in COMPRESSED_MODES else paged.trimmed("atten_mask", call.mask)
        call = replace(call, mask=mask, bias=paged.trimmed("pse_shift", call.bias))
    ends = (call.query_lengths, call.key_lengths) if layout_in == "TND" else (None, None)
    layout = layout_of(name, layout_in, query, key, value, call.heads, *ends, key_heads=key_heads)
    _check_limits(call, layout, key_heads)

    outs, sums = [], []
    sequences = zip(
        split(query, layout_in, layout.query_heads, layout.query_lengths),
        split(key, layout_in, layout.key_heads, layout.key_lengths),
        split(value, layout_in, layout.key_heads, layout.key_lengths),
        strict=True,
    )
    for index, (q, k, v) in enumerate(sequences):
        rows, columns = q.shape[1], k.shape[1]
        if layout_in != "TND":
            rows = length_of(name, "actual_seq_lengths", call.query_lengths, index, rows)
            columns = length_of(name, "actual_seq_lengths_kv", call.key_lengths, index, columns)
        scores = Scores(
            call.scale,
            _hidden(call, layout, index, rows, columns),
            _bias(call, layout, query.dtype, index, rows, columns),
            pse_last=True,
            sink=call.sink,
            empty_rows_give_zero=call.inner_precise in (2, 3),
        )
        written, maximum, total = attend(q[:, :rows], k[:, :columns], v[:, :columns], scores)
        out = torch.full((*q.shape[:2], v.shape[-1]), torch.nan, dtype=q.dtype)
        out[:, :rows] = written
        lse = torch.full(q.shape[:2], torch.nan)
        lse[:, :rows] = maximum + total.log()
        outs.append(out)
        sums.append(lse)
    lse = torch.cat(sums, 1).transpose(0, 1) if layout_in == "TND" else torch.stack(sums)
    return join(outs, layout_out), lse[..., None].contiguous()


def _check_limits(call: Call, layout: Layout, key_heads: int) -> None:
    name = call.operator
    require(
        layout.key_heads == key_heads,
        name,
        f"num_key_value_heads must be the number of key heads {layout.key_heads}, not {key_heads}",
    )
    require(call.heads <= MOST_HEADS, name, f"num_heads must be at most {MOST_HEADS}, not {call.heads}")
    group = call.heads // key_heads
    require(group <= LARGEST_GROUP, name, f"query heads per key head must be at most {LARGEST_GROUP}, not {group}")
    width, value_width = layout.head_dim, layout.value_dim
    if layout.name == "TND":
        require(
            width == value_width == 128 or (width == 192 and value_width in (128, 192)),
            name,
            f"TND needs D=128, or D=192 with Dv 128 or 192, not D={width}, Dv={value_width}",
        )
    require(
        width <= WIDEST_HEAD and width % 16 == 0,
        name,
        f"D must be a multiple of 16 and at most {WIDEST_HEAD}, not {width}",
    )


def _hidden(call: Call, layout: Layout, index: int, rows: int, columns: int) -> Tensor | None:
    """What sequence `index` may not see: a bool tensor that broadcasts to [N, rows, columns]."""
    name, mask = call.operator, call.mask
    if mask is None:
        return None
    require(
        mask.dtype in (torch.bool, torch.int8, torch.uint8),
        name,
        f"atten_mask must be bool, int8 or uint8, not {mask.dtype}",
    )
    longest = layout.longest
    single = longest[0] == 1
    mode = 0 if single else call.sparse_mode  # decoding ignores the sparse mode
    if mode in COMPRESSED_MODES:
        require(
            tuple(mask.shape) == (COMPRESSED, COMPRESSED) and torch.equal(mask.bool(), upper_triangle()),
            name,
            f"sparse_mode {mode} ({SPARSE_MODES[mode]}) needs atten_mask [2048, 2048] with ones above the diagonal "
            f"(triu(1), 1 means masked), not {list(mask.shape)}",
        )
        shift = 0 if mode == 2 else columns - rows
        before, after = (call.before, call.after) if mode == 4 else (UNLIMITED, 0)
        return outside_band(rows, columns, shift, before, after)
    batch = layout.batch
    allowed = [longest, *((b, *some) for b in (batch, 1) for some in (longest, (1, *longest)))]
    if single:
        allowed += [(batch, longest[1]), (batch, 1, longest[1]), (batch, 1, 1, longest[1])]
    shape = tuple(mask.shape)
    require(
        shape in allowed,
        name,
        f"atten_mask must be one of {[list(some) for some in dict.fromkeys(allowed)]}, not {list(shape)}",
    )
    if len(shape) == 2 and shape != longest:
        mask = mask[:, None]
    own = mask if mask.dim() == 2 else mask[index if mask.shape[0] > 1 else 0]
    hidden = own.bool()[..., :rows, :columns]
    if mode == 0 and not single:
        skipped = outside_band(rows, columns, 0, call.before, call.after)
        require(
            not bool((skipped & ~hidden).any()),
            name,
            f"sparse_mode 0: pre_tokens={call.before}, next_tokens={call.after} skip keys that the mask shows",
        )
    return hidden


def _bias(call: Call, layout: Layout, dtype: torch.dtype, index: int, rows: int, columns: int) -> Tensor | None:
    """What is added to the scaled scores of sequence `index`: [N, rows, columns]."""
    name, bias = call.operator, call.bias
    if bias is None:
        return None
    require(layout.name != "TND", name, "pse_shift in TND is not simulated")
    require_dtype(name, "pse_shift", bias, (dtype,))
    allowed = [(batch, call.heads, *layout.longest) for batch in dict.fromkeys((layout.batch, 1))]
    require(
        tuple(bias.shape) in allowed,
        name,
        f"pse_shift must be one of {[list(some) for some in allowed]}, not {list(bias.shape)}",
    )
    return bias[index if bias.shape[0] > 1 else 0][:, :rows, :columns]


def _refuse_others(name: str, options: dict[str, Any], simulated: set[str]) -> None:
    for argument, value in options.items():
        if argument not in simulated:
            off = value is None or value is False or (isinstance(value, int) and value == 0)
            require(off, name, f"{argument} is not simulated")


def npu_fused_infer_attention_score(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Attention for prefill and decode: (out, lse), lse empty unless softmax_lse_flag.

    float16 or bfloat16, contiguous; D a multiple of 16, at most 512. input_layout BSH, BSND, BNSD, BNSD_BSND, or TND
    (D 128). Lengths are host lists: cumulative for TND, else one per entry of the batch. atten_mask: 1 = masked;
    without it attention is full whatever the sparse mode. One query row: the sparse mode is ignored.
    """
    name = "npu_fused_infer_attention_score"
    _refuse_others(name, options, FIA_SIMULATED)
    call = Call(
        name, options["input_layout"], options["num_heads"], options["num_key_value_heads"], options["scale"],
        options["atten_mask"], options["sparse_mode"], options["pre_tokens"], options["next_tokens"],
        options["inner_precise"], options["actual_seq_lengths"], options["actual_seq_lengths_kv"],
        options["block_table"], options["block_size"], bias=options["pse_shift"],
    )  # fmt: skip
    out, lse = infer(call, query, key, value)
    return out, lse if options["softmax_lse_flag"] else torch.empty(0)


def npu_fused_infer_attention_score_v2(
    query: Tensor, key: Tensor, value: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """npu_fused_infer_attention_score under newer argument names, with learnable_sink [N]."""
    name = "npu_fused_infer_attention_score_v2"
    _refuse_others(name, options, FIA_V2_SIMULATED)
    call = Call(
        name, options["input_layout"], options["num_query_heads"], options["num_key_value_heads"],
        options["softmax_scale"], options["atten_mask"], options["sparse_mode"], options["pre_tokens"],
        options["next_tokens"], options["inner_precise"], options["actual_seq_qlen"], options["actual_seq_kvlen"],
        options["block_table"], options["block_size"], options["learnable_sink"],
    )  # fmt: skip
    out, lse = infer(call, query, key, value)
    return out, lse if options["return_softmax_lse"] else torch.empty(0)


def npu_prompt_flash_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Prefill attention. next_tokens is 0 by default, so a mask with sparse_mode 0 must hide every later key."""
    name = "npu_prompt_flash_attention"
    _refuse_others(name, options, PFA_SIMULATED)
    call = Call(
        name, options["input_layout"], options["num_heads"], options["num_key_value_heads"], options["scale_value"],
        options["atten_mask"], options["sparse_mode"], options["pre_tokens"], options["next_tokens"], 0,
        options["actual_seq_lengths"], options["actual_seq_lengths_kv"],
    )  # fmt: skip
    return infer(call, query, key, value)[0]


def npu_incre_flash_attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Decode attention for one query row; actual_seq_lengths are those of the keys."""
    name = "npu_incre_flash_attention"
    _refuse_others(name, options, IFA_SIMULATED)
    layout = options["input_layout"]
    require(layout in ("BSH", "BSND", "BNSD"), name, f"input_layout must be BSH, BSND or BNSD, not {layout!r}")
    length_at = 2 if layout == "BNSD" else 1
    require(query.shape[length_at] == 1, name, f"query must have one row (Sq = 1), not {list(query.shape)} in {layout}")
    call = Call(
        name, layout, options["num_heads"], options["num_key_value_heads"], options["scale_value"],
        options["atten_mask"], inner_precise=options["inner_precise"], key_lengths=options["actual_seq_lengths"],
        block_table=options["block_table"], block_size=options["block_size"],
    )  # fmt: skip
    return infer(call, query, key, value)[0]


COMMON = {"atten_mask", "input_layout", "num_key_value_heads"}
PAGED = {"block_table", "block_size", "inner_precise"}
BAND = {"sparse_mode", "pre_tokens", "next_tokens"}
LENGTHS = {"actual_seq_lengths", "actual_seq_lengths_kv"}
FIA_SIMULATED = COMMON | PAGED | BAND | LENGTHS | {"num_heads", "scale", "softmax_lse_flag", "pse_shift"}
FIA_V2_SIMULATED = (
    COMMON
    | PAGED
    | BAND
    | {"num_query_heads", "softmax_scale", "actual_seq_qlen", "actual_seq_kvlen"}
    | {"learnable_sink", "return_softmax_lse"}
)
PFA_SIMULATED = COMMON | BAND | LENGTHS | {"num_heads", "scale_value"}
IFA_SIMULATED = COMMON | PAGED | {"actual_seq_lengths", "num_heads", "scale_value"}

KERNELS = {
    "npu_fused_infer_attention_score": Kernel(npu_fused_infer_attention_score),
    "npu_fused_infer_attention_score_v2": Kernel(npu_fused_infer_attention_score_v2),
    "npu_prompt_flash_attention": Kernel(npu_prompt_flash_attention),
    "npu_incre_flash_attention": Kernel(npu_incre_flash_attention),
}
