"""What stands in `AttentionInterface['sdpa']` and `['npu']`: transformers' sdpa, on the fused operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.ops.attention.band import CAUSAL_TOP_LEFT, FULL, Band, in_operator_shape, inverted
from npu_patch.ops.attention.call import Attention
from npu_patch.patches.attention.checked import Attend
from npu_patch.serving.dispatch import TUNED
from npu_patch.serving.once_per_step import OncePerTensor
from npu_patch.serving.replacement import Unfused, Unserved
from npu_patch.waiting.contract import materialised
from npu_patch.waiting.masks import PatternMask

# Arguments that change the result and that the operator has nothing for.
REFUSED = {
    "softcap": "softcap",
    "output_attentions": "the attention weights are asked for",
    "cache": "a paged cache",
    "block_table": "a paged cache",
}
# Masks as the operator takes them: every layer of a step is given the same mask.
_INVERTED, _SPLIT = OncePerTensor(), OncePerTensor()


def refused(arguments: dict[str, Any]) -> Unserved | None:
    for name, reason in REFUSED.items():
        value = arguments.get(name)
        if value is not None and value is not False:
            return Unserved(reason)
    return None


class _Given(NamedTuple):
    """The arguments that the op knows of. query `[B, N, Sq, D]`, key and value `[B, Nkv, Skv, D]`."""

    module: torch.nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    scaling: float | None
    is_causal: bool | None
    position_bias: Tensor | None
    sink: Tensor | None

    @property
    def causal(self) -> bool:
        return bool(getattr(self.module, "is_causal", True) if self.is_causal is None else self.is_causal)

    @property
    def scale(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling


def serve(original: Callable[..., Any], device_type: str, attend: Attend) -> Callable[..., Any]:
    def serve_sdpa(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None] | Unserved | Unfused:
        """-> `[B, Sq, N, D]`, None."""
        given = _Given(module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, s_aux)
        result = serve_fused(given, others)
        if s_aux is not None and isinstance(result, Unserved) and refused(others) is None:
            # The original would leave the sinks out without a word.
            return Unfused((_with_sinks(given, s_aux), None), result.reason)
        return result

    def serve_fused(given: _Given, others: dict[str, Any]) -> tuple[Tensor, None] | Unserved | Unfused:
        if given.query.device.type != device_type:
            return Unserved(f"input on {given.query.device.type}")
        if torch.compiler.is_compiling():
            return Unserved("being compiled")
        reason = refused(others)
        if reason is not None:
            return reason
        query, key, value = autocast(given.query, given.key, given.value)
        scale, mask, position_bias = given.scale, given.mask, given.position_bias
        if isinstance(mask, PatternMask):
            packed = _packed(query, key, value, mask, given)
            out = None if packed is None else attend(*packed)
            if isinstance(out, Tensor):
                return out.unflatten(0, (query.shape[0], query.shape[2])), None
            if isinstance(out, str) and out.startswith(TUNED):
                return Unserved(out)
        causal = query.shape[2] > 1 and mask is None and given.causal
        if causal and position_bias is not None and key.shape[2] > query.shape[2]:
            # Causality is aligned to the top left: later keys are not seen, and transformers cuts the bias too.
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            position_bias = position_bias[..., : query.shape[2]]
        attention = _dense(query.shape, key.shape, given, position_bias, causal)
        if isinstance(attention, Unserved):
            return attention
        out = attend(query, key, value, attention)
        if isinstance(out, Tensor):
            return out, None
        mask = materialised(given.mask, "attention")
        if mask is not None and mask.is_floating_point() and given.sink is None:
            # The original would take every element but 0 for "hidden" on an NPU.
            return Unfused((_exact(query, key, value, mask, position_bias, scale, given.dropout), None), out)
        return Unserved(out)

    return serve_sdpa


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As aten's attention casts its inputs under autocast; torch_npu's own operators do not know of it."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)


def _packed(
    query: Tensor, key: Tensor, value: Tensor, mask: PatternMask, given: _Given
) -> tuple[Tensor, Tensor, Tensor, Attention] | None:
    """All rows of the batch as one packed sequence `[T, N, D]`, where the mask is the pattern of one."""
    if mask.pattern is None or mask.pattern.ends is None or given.position_bias is not None:
        return None
    if mask.shape[2] != query.shape[2] or mask.shape[3] != key.shape[2] or mask.shape[0] != query.shape[0]:
        return None
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    ends = (mask.pattern.ends, mask.pattern.ends)
    return query, key, value, Attention(given.scale, mask.pattern.band, None, None, given.sink, given.dropout, ends)


def _dense(
    shape: torch.Size, key_shape: torch.Size, given: _Given, position_bias: Tensor | None, causal: bool
) -> Attention | Unserved:
    """For query and key of these shapes."""
    queries, keys = shape[2], key_shape[2]
    band, hidden, bias = _band(given.mask, causal, queries, keys), None, position_bias
    # transformers adds the lowest number to a position bias to hide a key: a row without any averages the values.
    # Without a position bias, torch's attention gives such a row zeros.
    empty_rows_give_zero = position_bias is None
    if band is None:
        band, mask = FULL, materialised(given.mask, "attention")
        if mask.dtype == torch.bool:
            hidden = _INVERTED.of((mask,), lambda: inverted(mask))
        elif mask.is_floating_point():
            empty_rows_give_zero = True
            if position_bias is None and not mask.requires_grad:
                hidden, bias = _SPLIT.of((mask,), lambda: _split(mask))
            else:
                hidden, bias = _split(mask if position_bias is None else position_bias + mask)
        else:
            return Unserved(f"a mask of {mask.dtype}")
        hidden = in_operator_shape(hidden, shape[0], shape[1], queries, keys)
        if hidden is None:
            return Unserved(f"a mask of another shape than the scores, {mask.dim()} dimensions")
    return Attention(
        given.scale,
        band,
        hidden,
        bias,
        given.sink,
        given.dropout,
        empty_rows_give_zero=empty_rows_give_zero,
        decodes=queries == 1 < keys and given.causal,
    )


def _band(mask: Tensor | None, causal: bool, queries: int, keys: int) -> Band | None:
    """The band that a mask, or the lack of one, stands for; None where a mask has to be applied."""
    if mask is None:
        return CAUSAL_TOP_LEFT if causal else FULL
    if not isinstance(mask, PatternMask) or mask.pattern is None or mask.pattern.ends is not None:
        return None
    return mask.pattern.band if mask.shape[2] == queries and mask.shape[3] == keys else None


def _split(additive: Tensor) -> tuple[Tensor, Tensor]:
    """An additive mask as what it hides (minus infinity) and what it adds."""
    additive = additive[None, None] if additive.dim() == 2 else additive
    hidden = additive == float("-inf")
    return hidden, additive.masked_fill(hidden, 0.0)


def _with_sinks(given: _Given, sinks: Tensor) -> Tensor:
    """torch's attention with one more key for each head, whose score is of `sinks` `[N]` and whose value is zero."""
    query, key, value, position_bias = given.query, given.key, given.value, given.position_bias
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    mask = materialised(given.mask, "attention")
    if mask is None and given.causal and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    additive = query.new_zeros(1, 1, 1, 1) if position_bias is None else position_bias
    if mask is not None:
        hides = mask.dtype == torch.bool
        additive = torch.where(mask, additive, float("-inf")) if hides else additive + mask
    additive = additive.expand(len(query), heads, queries, keys)
    column = sinks.to(additive.dtype).view(1, heads, 1, 1).expand(len(query), heads, queries, 1)
    key, value = (F.pad(tensor, (0, 0, 0, 1)) for tensor in (key, value))
    return _exact(query, key, value, torch.cat((additive, column), -1), None, given.scale, given.dropout)


def _exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    position_bias: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """torch's attention with an additive mask, in the widest of the dtypes: torch_npu computes it as written."""
    mask = mask if position_bias is None else position_bias + mask
    dtype = torch.promote_types(query.dtype, mask.dtype)
    out = F.scaled_dot_product_attention(
        query.to(dtype),
        key.to(dtype),
        value.to(dtype),
        attn_mask=mask.to(dtype),
        dropout_p=dropout,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.to(query.dtype).transpose(1, 2).contiguous()
