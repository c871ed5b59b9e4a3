"""Whether a vision attention layer computes the same by one call of flash attention as by a call for each segment.

A tiny layer runs its own forward twice, with a reference of ours for its attention: segment by segment, and seen as one
that asked for flash attention. The outputs and every gradient must be the same, of one call.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.closeness import distance
from npu_patch.numerics.error_text import error_text
from npu_patch.numerics.findings import unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import values
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.probe.attention import REGISTRY
from npu_patch.probe.tiny_layer import CONFIG, Config, Unobservable, fill, tensors_in
from npu_patch.sites.sites import innermost
from npu_patch.waiting.as_flash import SEGMENTS, as_flash

HEADS, HEAD_DIM, PATCHES = 3, 8, 9
HIDDEN = HEADS * HEAD_DIM
CUT = (0, 4, 5, 9)
# What the configs of towers call their sizes.
NAMES = {
    "hidden_size": HIDDEN,
    "embed_dim": HIDDEN,
    "d_model": HIDDEN,
    "width": HIDDEN,
    "num_heads": HEADS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "encoder_attention_heads": HEADS,
    "attention_heads": HEADS,
    "head_dim": HEAD_DIM,
    "attention_bias": True,
    "qkv_bias": True,
    "norm_eps": 1e-2,
    "attention_probs_dropout_prob": 0.0,
    "_attn_implementation": "sdpa",
}


def read_vision_attention(cls: type[torch.nn.Module]) -> AsNamed | NotRead:
    with quiet_room():
        try:
            layer = _build(cls)
            far = max(_distance(layer.to(dtype), dtype) for dtype in (torch.float32, torch.bfloat16))
        except Unobservable as problem:
            return NotRead(str(problem))
        except Exception as problem:
            unless_accident(problem)
            return NotRead(f"seen as asking for flash attention it fails: {error_text(problem)}")
    if far > 1.0:
        return NotRead(f"by one call it computes something else: {far:.3g} tolerances away")
    return AsNamed("attention within segments")


def _build(cls: type[torch.nn.Module]) -> torch.nn.Module:
    """In evaluation mode, with fixed weights; by its config, or by the sizes that its `__init__` names."""
    config = Config(**{**CONFIG, **NAMES})
    given = {
        each.name: config if "config" in each.name else NAMES.get(each.name, 0)
        for each in _named(cls.__init__)
        if each.default is each.empty or "config" in each.name
    }
    try:
        layer = cls(**given)
    except Exception as error:
        unless_accident(error)
        raise Unobservable(f"no tiny layer of it could be made: {error_text(error)}") from error
    if not hasattr(layer, "config"):
        raise Unobservable("it asks no config for its attention")
    fill(layer, 60)
    return layer.eval()


def _distance(layer: torch.nn.Module, dtype: torch.dtype) -> float:
    """How far one call is from a call for each segment, in tolerances."""
    problem: Exception | None = None
    for shape, given in itertools.product(((PATCHES, HIDDEN), (1, PATCHES, HIDDEN)), _arguments(layer, dtype)):
        expected_x, x = (values(shape, 70, dtype, grad=True) for _ in range(2))
        try:
            expected = tensors_in(_forward(layer, _Attention(None))(layer, expected_x, **given))
        except Exception as error:  # other dimensions, or positions of another kind
            unless_accident(error)
            problem = problem or error
            continue
        attention = _Attention(given[SEGMENTS])
        observed = tensors_in(_forward(layer, attention)(as_flash(layer), x, **given))
        if attention.called != 1:
            raise Unobservable(f"it asks for flash attention {attention.called} times")
        leaves = list(layer.parameters())
        return distance(observed, expected, [x, *leaves], [expected_x, *leaves])
    why = "it has no arguments" if problem is None else error_text(problem)
    raise Unobservable(f"its forward needs more than a tiny layer has: {why}") from problem


def _arguments(layer: torch.nn.Module, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Beside the hidden states; positions as the towers of transformers make them: tables of two widths, or numbers on
    the unit circle; angles up to transformers 5.9."""
    named = _named(innermost(type(layer).forward))[1:]
    half = (PATCHES, HEAD_DIM // 2)
    tables = [tuple(values((PATCHES, width), seed, dtype) for seed in (71, 72)) for width in (HEAD_DIM, HEAD_DIM // 2)]
    all_given = []
    for positions in (*tables, torch.polar(torch.ones(half), values(half, 71)), None):
        given = {
            SEGMENTS: torch.tensor(CUT, dtype=torch.int32),
            "position_embeddings": positions,
            "rotary_pos_emb": values(half, 71) if positions is None else None,
        }
        wanted = (each.name for each in named if each.name in given or each.default is each.empty)
        all_given.append({name: given.get(name) for name in wanted})
    return all_given


def _named(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters after `self` that have a name of their own."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]


def _forward(layer: torch.nn.Module, registry: _Attention) -> Callable[..., Any]:
    """The forward of its class, which finds `registry` in place of transformers' own, that nobody else sees changed."""
    function: FunctionType = innermost(type(layer).forward)
    own = {**function.__globals__, REGISTRY: registry}
    copied = FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


class _Attention:
    """In place of AttentionInterface: attention within the segments of `lengths`; None: of one call each."""

    def __init__(self, lengths: Tensor | None) -> None:
        self.lengths, self.called = lengths, 0

    def get_interface(self, name: str, default: Any = None) -> Callable[..., Any]:
        return self.attend

    __getitem__ = get = get_interface

    def attend(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, None]:
        """query, key, value: `[1, N, T, D]`."""
        self.called += 1
        causal = given.get("is_causal", getattr(layer, "is_causal", True))
        named = (given.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k"))
        if attention_mask is not None or causal or not all(each is self.lengths for each in named):
            raise Unobservable("it tells its attention something else than its segments")
        scale = given.get("scaling") or query.shape[-1] ** -0.5
        ends = (0, query.shape[2]) if self.lengths is None else CUT
        outs = []
        for start, end in itertools.pairwise(ends):
            q, k, v = (each[:, :, start:end] for each in (query, key, value))
            k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
            weights = (q @ k.mT * scale).softmax(-1, dtype=torch.float32).to(q.dtype)
            outs.append((weights @ v).transpose(1, 2))
        return torch.cat(outs, 1), None
