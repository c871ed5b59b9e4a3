"""Whether an attention layer does nothing with q and k between the norm of their heads and their rotation.

A tiny layer runs its own forward twice: as it is, and with two of its norms put off until the rotation, which then
computes both in the original's arithmetic. The outputs and every gradient must be the same. Which two norms those are
is what the rotation was given.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.closeness import distance
from npu_patch.numerics.error_text import error_text
from npu_patch.numerics.findings import unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.ops.qk_norm_rope import Heads, reference, why_not_fused
from npu_patch.ops.readings import NotRead, RMSNormReading, RoPEReading
from npu_patch.probe.tiny_layer import HEAD_DIM, Unobservable, arguments, build, tensors_in
from npu_patch.waiting.contract import Abandoned
from npu_patch.waiting.heads import NORMS, Deferral, DeferredHeads, RoPESite, deferring


@dataclass(frozen=True)
class QKNormRoPEReading:
    """The attributes that hold the norms of q and of k, and the name of what both steps compute."""

    q_norm: str
    k_norm: str
    name: str


def read_qk_norm_rope(cls: type[torch.nn.Module], rotation: RoPESite) -> QKNormRoPEReading | NotRead:
    """`rotation` is the replacement's of the rotary function that the forward of `cls` looks up."""
    with quiet_room():
        try:
            layer = build(cls)
            norms = _norms(layer)
            if len(norms) < 2:
                return NotRead("it has no two norms that are served", notable=False)
            return _read(layer, norms, rotation)
        except Unobservable as error:
            return NotRead(str(error), notable="norm" in str(cls.__init__.__code__.co_names))


def _norms(layer: torch.nn.Module) -> dict[str, RMSNormReading]:
    """The layer's own norms whose class has a replacement that takes part."""
    found = {}
    for name, module in layer.named_children():
        site = NORMS.get(type(module).forward)
        reading = site.reading_of(module) if site is not None and site.calls.active else None
        if isinstance(reading, RMSNormReading):
            found[name] = reading
    return found


def _read(layer: torch.nn.Module, norms: dict[str, RMSNormReading], rotation: RoPESite) -> QKNormRoPEReading | NotRead:
    why = NotRead("", notable=False)
    for names in itertools.combinations(norms, 2):
        given: list[tuple[str, str]] = []
        reasons = [
            _difference(layer.to(dtype), names, norms, rotation, width, given)
            for dtype in (torch.float32, torch.bfloat16)
            for width in ((HEAD_DIM, HEAD_DIM // 2) if rotation.reading.partial else (HEAD_DIM,))
        ]
        reason = next(filter(None, reasons), None)
        if reason is None and len(set(given)) == 1:
            q_norm, k_norm = given[0]
            variants = dict.fromkeys((norms[q_norm].variant.name, norms[k_norm].variant.name))
            return QKNormRoPEReading(q_norm, k_norm, f"{' and '.join(variants)}; {rotation.reading.variant.name}")
        why = NotRead(reason or "its norms change places", notable=True)
    return why


def _difference(
    layer: torch.nn.Module,
    names: tuple[str, str],
    norms: dict[str, RMSNormReading],
    rotation: RoPESite,
    table_width: int,
    given: list[tuple[str, str]],
) -> str | None:
    """Why the layer with the norms put off is not the layer as it is; `given` gets which was q's and which was k's."""
    called_with = arguments(layer, layer_dtype(layer), rotation.reading.variant.table.width(table_width))
    modules = (getattr(layer, names[0]), getattr(layer, names[1]))

    def rotate(
        reading: RoPEReading, q: DeferredHeads, k: DeferredHeads, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        reason = why_not_fused((q.variant, k.variant), reading.variant)
        if reason is not None:
            raise Abandoned(reason)
        of_norm = dict(zip(modules, names, strict=True))
        given.append((of_norm[q.norm], of_norm[k.norm]))
        q_heads, k_heads = (Heads(each.x.transpose(1, 2), each.weight, each.eps, each.variant) for each in (q, k))
        return reference(q_heads, k_heads, cos, sin, reading.variant)

    deferral = Deferral(modules, rotate)

    def run(defer: bool) -> tuple[list[Tensor], list[Tensor]]:
        x = called_with["hidden_states"].detach().clone().requires_grad_(True)
        with _on_originals(layer, rotation, deferral if defer else None, norms):
            result = layer(**{**called_with, "hidden_states": x})
        return tensors_in(result), [x, *layer.parameters()]

    try:
        expected, expected_inputs = run(defer=False)
    except Exception as error:
        unless_accident(error)
        raise Unobservable(f"its forward needs more than a tiny layer has: {error_text(error)}") from error
    try:
        observed, inputs = run(defer=True)
    except Abandoned as error:
        return str(error)
    except Exception as error:
        unless_accident(error)
        return f"with its norms put off it raises {error_text(error)}"
    if not deferral.done:
        return "its norms are not followed by a rotation"
    far = distance(observed, expected, inputs, expected_inputs)
    return None if expected and far <= 1.0 else f"computes something else: {far:.3g} tolerances away"


def layer_dtype(layer: torch.nn.Module) -> torch.dtype:
    return next(layer.parameters()).dtype


@contextlib.contextmanager
def _on_originals(
    layer: torch.nn.Module, rotation: RoPESite, deferral: Deferral | None, norms: dict[str, RMSNormReading]
) -> Iterator[None]:
    """Norms and the rotation compute what they did before they were patched, and count nothing."""
    active = rotation.calls.active
    rotation.calls.active = active and deferral is not None  # deferred heads are not counted
    for name, reading in norms.items():
        norm = getattr(layer, name)
        vars(norm)["forward"] = MethodType(_forward(NORMS[type(norm).forward].original, reading, deferral), norm)
    try:
        with deferring(deferral):
            yield
    finally:
        rotation.calls.active = active
        for name in norms:
            del vars(getattr(layer, name))["forward"]


def _forward(original: Callable[..., Any], reading: RMSNormReading, deferral: Deferral | None) -> Callable[..., Any]:
    def forward(norm: torch.nn.Module, x: Tensor) -> Any:
        deferred = None
        if deferral is not None:
            weight = getattr(norm, reading.weight_name) if reading.weight_name else None
            deferred = deferral.defer(norm, x, weight, getattr(norm, reading.eps_name), reading.variant)
        return original(norm, x) if deferred is None else deferred

    return forward
