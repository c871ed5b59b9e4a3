"""Scaled dot-product attention: `softmax(scale * q @ k.mT + bias, hidden) @ v` (https://arxiv.org/abs/1706.03762).

`npu_fusion_attention` holds no score in memory, forward or backward (https://arxiv.org/abs/2205.14135), shares key
heads among query heads by itself, and takes packed sequences without a mask. Single tokens beside a cache that
need no backward go to the inference operator (ops/attention/decode.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_patch.ops.attention import decode as attention_decode
from npu_patch.ops.attention.band import Band, band_arguments, broadcasts, why_no_band
from npu_patch.ops.attention.call import Attention
from npu_patch.serving.implementation import FLOAT_DTYPES, Implementation, is_plain, needs_operators
from npu_patch.serving.operators import Operator

MOST_HEADS, WIDEST_HEAD, MOST_SEQUENCES = 256, 768, 2048
SCALE_THEN_ADD = 0  # pse_type: the bias is added to the scaled scores
# Keywords and every default spelt out: the schema grew from release to release.
_SPELT_OUT = (
    *("head_num", "input_layout", "padding_mask", "atten_mask", "scale", "keep_prob", "inner_precise", "prefix"),
    *("actual_seq_qlen", "actual_seq_kvlen", "sparse_mode", "gen_mask_parallel", "sync"),
)
NPU_ATTENTION = Operator("npu_fusion_attention", (*_SPELT_OUT, "pre_tockens", "next_tockens"), gradient=True)
WITH_SINK = Operator("npu_fusion_attention", ("sink",), gradient=True)
# Only the second version adds the bias to the scaled scores: the first one would need it divided by the scale.
WITH_BIAS = Operator(
    "npu_fusion_attention_v2", (*_SPELT_OUT, "pre_tokens", "next_tokens", "pse", "pse_type"), gradient=True
)
EMPTY_ROWS_AVERAGE, EMPTY_ROWS_ZERO = 0, 2  # inner_precise: what a query without any key gets


def _npu_attention(query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
    """`[B, Sq, N, Dv]`, contiguous; packed `[T, N, Dv]`."""
    if attention.ends is not None:
        queries, keys = attention.ends
        return _fusion_attention(query, key, value, attention, "TND", list(queries), list(keys))
    if attention_decode.serves(query, key, value, attention):
        return attention_decode.decode(query, key, value, attention)
    if _fewer_copies_in_bsnd(query, key, value):
        turned = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return _fusion_attention(*turned, attention, "BSND")
    out = _fusion_attention(query, key, value, attention, "BNSD")
    return out.transpose(1, 2).contiguous()


def _fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: Attention,
    layout: str,
    query_ends: list[int] | None = None,
    key_ends: list[int] | None = None,
) -> Tensor:
    operator = torch.ops.npu.npu_fusion_attention
    arguments = band_arguments(_simplified(query, key, attention, layout), query.device)
    if attention.hidden is not None:
        arguments["atten_mask"] = attention.hidden
    if attention.sink is not None:
        arguments["sink"] = attention.sink.float()
    if attention.bias is not None:
        operator = torch.ops.npu.npu_fusion_attention_v2
        arguments["pse"], arguments["pse_type"] = _as_pse(query, key, attention.bias, layout), SCALE_THEN_ADD
        arguments["pre_tokens"], arguments["next_tokens"] = arguments.pop("pre_tockens"), arguments.pop("next_tockens")
    return operator(
        query,
        key,
        value,
        head_num=query.shape[2 if layout == "BSND" else 1],
        input_layout=layout,
        padding_mask=None,
        scale=attention.scale,
        keep_prob=1.0 - attention.dropout,
        inner_precise=EMPTY_ROWS_ZERO if attention.empty_rows_give_zero else EMPTY_ROWS_AVERAGE,
        prefix=None,
        actual_seq_qlen=query_ends,
        actual_seq_kvlen=key_ends,
        gen_mask_parallel=True,
        sync=False,
        **arguments,
    )[0]


def _simplified(query: Tensor, key: Tensor, attention: Attention, layout: str) -> Band:
    """A band that hides no key needs no mask; which cannot be said of packed sequences without their lengths."""
    if layout == "TND":
        return attention.band
    axis = 1 if layout == "BSND" else 2
    return attention.band.within(query.shape[axis], key.shape[axis])


def _as_pse(query: Tensor, key: Tensor, bias: Tensor, layout: str) -> Tensor:
    """`[B or 1, N, Sq, Skv]`: the operator broadcasts nothing but the batch."""
    heads, length = (2, 1) if layout == "BSND" else (1, 2)
    batch = 1 if bias.dim() < 4 or bias.shape[0] == 1 else bias.shape[0]
    return bias.to(query.dtype).expand(batch, query.shape[heads], query.shape[length], key.shape[length])


def _fewer_copies_in_bsnd(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """The operator copies inputs that are not contiguous in its layout; BNSD costs a copy of the result besides."""
    in_bnsd = [tensor for tensor in (query, key, value) if tensor.is_contiguous()]
    if not in_bnsd:  # projections, mostly: it would copy all three, so nothing needs to be turned to know
        return True
    copied_in_bnsd = sum(tensor.numel() for tensor in (query, key, value)) - sum(tensor.numel() for tensor in in_bnsd)
    copied_in_bsnd = sum(t.numel() for t in (query, key, value) if not t.transpose(1, 2).is_contiguous())
    return copied_in_bsnd <= copied_in_bnsd + query.numel()


def _unsupported(query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> str | None:
    """Limits of npu_fusion_attention (operator documentation) and of torch_npu's own use of it."""
    if not (is_plain(query) and is_plain(key) and is_plain(value)):
        return "tensor subclass"
    tensors, dtype, device = (query, key, value), query.dtype, query.device
    alike = key.dtype == value.dtype == dtype and key.device == value.device == device
    if not alike or dtype not in FLOAT_DTYPES:
        return f"query, key and value of {', '.join(f'{t.dtype} on {t.device.type}' for t in tensors)}"
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    packed = attention.ends is not None
    if not len(shape) == len(key_shape) == len(value_shape) == (3 if packed else 4):
        return _of_shapes(*tensors)
    if not (query.numel() and key.numel() and value.numel()):
        return _of_shapes(*tensors)
    heads, key_heads = shape[1], key_shape[1]
    head_dim, value_dim = shape[-1], value_shape[-1]
    same = key_shape[:-1] == value_shape[:-1] and head_dim == key_shape[-1] and (packed or shape[0] == key_shape[0])
    if not same or heads % key_heads:
        return _of_shapes(*tensors)
    if heads > MOST_HEADS or head_dim > WIDEST_HEAD or value_dim > head_dim:
        return (
            f"{heads} heads of {head_dim}, values of {value_dim}: the operator takes up to 256 of 768, values no wider"
        )
    if dtype == torch.float32 and (head_dim % 4 or value_dim % 4):
        return f"float32 heads of {head_dim}, values of {value_dim}: torch_npu keeps the operator to multiples of 4"
    if not 0.0 <= attention.dropout < 1.0:
        return f"dropout {attention.dropout}"
    if attention.sink is not None and (reason := _unsupported_sink(attention.sink, heads)):
        return reason
    if attention.ends is not None:
        return _unsupported_packing(attention, *attention.ends)
    if attention.bias is not None and (reason := _unsupported_bias(query, key, attention.bias)):
        return reason
    return why_no_band(attention.band.within(shape[2], key_shape[2]), shape[2], key_shape[2])


def _of_shapes(*tensors: Tensor) -> str:
    return f"query, key and value of shapes {[tuple(tensor.shape) for tensor in tensors]}"


def _unsupported_sink(sink: Tensor, heads: int) -> str | None:
    if (reason := WITH_SINK.missing()) is not None:
        return f"attention sinks: {reason}"
    return None if sink.shape == (heads,) else f"attention sinks of shape {tuple(sink.shape)} for {heads} heads"


def _unsupported_packing(attention: Attention, queries: tuple[int, ...], keys: tuple[int, ...]) -> str | None:
    if attention.bias is not None or attention.hidden is not None:
        return "a bias or mask over packed sequences"
    if len(queries) > MOST_SEQUENCES:
        return f"{len(queries)} packed sequences, the operator takes {MOST_SEQUENCES}"
    lengths, key_lengths = _differences(queries), _differences(keys)
    if queries != keys and not attention.band.is_full:
        if any(length > its_keys for length, its_keys in zip(lengths, key_lengths, strict=True)):
            return "a packed sequence with fewer keys than queries"  # its first queries see no key: undefined in TND
        if not attention.band.bottom_right:
            return "packed sequences with causality aligned to the top left"
    return None


def _unsupported_bias(query: Tensor, key: Tensor, bias: Tensor) -> str | None:
    """The operator takes the bias in the dtype of the query: a wider one would be rounded."""
    if (lacking := WITH_BIAS.missing()) is not None:
        return f"a bias: {lacking}"
    wanted = (*query.shape[:3], key.shape[2])
    if not broadcasts(bias, wanted):
        return f"a bias of another shape than the scores, {bias.dim()} dimensions"
    if torch.promote_types(bias.dtype, query.dtype) != query.dtype:
        return f"a bias of {bias.dtype}, which {query.dtype} would round"
    return None


def _differences(ends: tuple[int, ...]) -> list[int]:
    return [end - start for start, end in zip((0, *ends), ends, strict=False)]


IMPLEMENTATION = Implementation(
    "torch_npu.npu_fusion_attention",
    ("npu",),
    _npu_attention,
    _unsupported,
    needs_operators(NPU_ATTENTION),
    partly={
        "with attention sinks": WITH_SINK,
        "with a bias": WITH_BIAS,
        "single queries": attention_decode.OPERATOR,
    },
)
