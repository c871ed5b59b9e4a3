"""QK-norm with RoPE: every attention layer that normalizes the heads of q and k and then rotates them.

Rebinds    `forward` of the class, with one that runs the original forward while its two norms are put off until the
           rotation (npu_patch/waiting/heads.py). Projections (LoRA and all), cache, attention interface and output
           stay the original's business.
To         one Triton kernel forward and one backward, from the layout of the projections to that of attention.
Not when   the patches of RMSNorm and RoPE do not serve its norms and its rotary function, anything else is done to q or
           k in between, or the norms differ. A call falls through under compilation, where
           somebody listens to a part of the layer, for tensors on another device, and what the kernel does not take.
Delete     when torch_npu has an operator for both, or transformers a registration point for norms before rotation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.qk_norm_rope import QK_NORM_ROPE, Heads, case, one_after_the_other
from npu_patch.ops.readings import NotRead, RMSNormReading, RoPEReading
from npu_patch.ops.rms_norm import RMS_NORM
from npu_patch.ops.rope import ROPE, rotary_dim
from npu_patch.patches.head_sizes import rotary_widths
from npu_patch.patches.patch import NOT_FASTER, Context, Patch, Replacement
from npu_patch.probe.qk_norm_rope import QKNormRoPEReading, read_qk_norm_rope
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Alternative, Case
from npu_patch.serving.implementation import choose
from npu_patch.serving.listeners import listener
from npu_patch.serving.replacement import Unfused, Unserved, replacement_for
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import LiveModules, Site, rebindable_forwards
from npu_patch.waiting.contract import Abandoned
from npu_patch.waiting.heads import NORMS, ROTATIONS, Deferral, DeferredHeads, RoPESite, deferring


def find(module: ModuleType) -> Iterable[Site]:
    """Forwards that look up one rotary function of their module, among those that the patch of RoPE serves."""
    names = {name for name, value in vars(module).items() if _rotation(value) is not None}
    for site in rebindable_forwards(module) if names else ():
        if names & names_used(site.original):
            yield site


def read_site(site: Site) -> QKNormRoPEReading | NotRead:
    rotations = _rotations(site.original)
    if len(rotations) != 1:
        return NotRead(f"it rotates by {len(rotations)} functions", notable=False)
    return read_qk_norm_rope(site.owner, rotations[0])


def bind_site(site: Site, found: QKNormRoPEReading, context: Context) -> Replacement:
    original, calls, device_type = site.original, Calls(), context.device_type
    (rotation,) = _rotations(original)
    dispatch = context.dispatch(lambda live: _cases(site.owner, found, rotation, live, context))

    def rotate(
        reading: RoPEReading, q: DeferredHeads, k: DeferredHeads, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor] | str:
        q_heads, k_heads = (Heads(each.x.transpose(1, 2), each.weight, each.eps, each.variant) for each in (q, k))
        if not reading.partial and rotary_dim(cos, reading.variant) != q.x.shape[-1]:
            raise Abandoned("tables narrower than the head")
        call = (q_heads, k_heads, cos, sin, reading.variant)
        serving = dispatch.serving(calls, *call)
        return serving if isinstance(serving, str) else serving.run(*call)

    def serve(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if dispatch.idle:
            return Unserved(NOT_FASTER)
        reason = _why_not(self, found.q_norm, found.k_norm, device_type)
        if reason is not None:
            return Unserved(reason)
        deferral = Deferral((getattr(self, found.q_norm), getattr(self, found.k_norm)), rotate)
        try:
            with deferring(deferral):
                result = original(self, *args, **kwargs)
        except (Abandoned, TypeError) as error:
            if not deferral.pending:
                raise
            return Unserved(str(error))
        not_put_off = deferral.why_not or "its norms or its rotation were not put off"
        return result if deferral.done else Unfused(result, not_put_off)

    return Replacement(
        replacement_for(original, calls, serve, bypassed=Bypassed()), found.name, calls, dispatch=dispatch
    )


def _cases(
    cls: type, found: QKNormRoPEReading, rotation: RoPESite, live: LiveModules, context: Context
) -> Iterator[Case]:
    """Of the layers whose config says how many heads they have, beside the two operators one after the other."""
    normalizes = choose(RMS_NORM.implementations, context.device_type).chosen
    rotates = choose(ROPE.implementations, context.device_type).chosen
    if normalizes is None or rotates is None:
        return
    original = Alternative("RMSNorm, then RoPE", one_after_the_other(normalizes.run, rotates.run))
    for layer in live.of(cls):
        config, norm = getattr(layer, "config", None), getattr(layer, found.q_norm, None)
        q_heads, k_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
        if not (isinstance(norm, torch.nn.Module) and isinstance(q_heads, int) and isinstance(k_heads, int)):
            continue
        site = NORMS.get(type(norm).forward)
        reading = None if site is None else site.reading_of(norm)
        if isinstance(reading, RMSNormReading) and reading.weight_name:
            weight = getattr(norm, reading.weight_name)
            head_dim = weight.shape[-1]
            for rotary in rotary_widths(live, config, head_dim) if rotation.reading.partial else {head_dim}:
                variants = reading.variant, rotation.reading.variant
                yield case(*variants, (q_heads, k_heads), head_dim, rotary, live.dtype, weight.dtype, original)


def _why_not(layer: torch.nn.Module, q_norm: str, k_norm: str, device_type: str) -> str | None:
    """What is known before the layer runs: cheaply, for every call."""
    if torch.compiler.is_compiling():
        return "being compiled"
    for name in (q_norm, k_norm):
        norm = getattr(layer, name, None)
        if not isinstance(norm, torch.nn.Module):
            return f"no module in {name}"
        site = NORMS.get(type(norm).forward)
        if site is None or not site.calls.active:
            return f"{name} is a {type(norm).__name__}, which is not served"
        weight = next(norm.parameters(recurse=False), None)
        if weight is not None and weight.device.type != device_type:
            return f"{name} on {weight.device.type}"
    # To any of its parts: a forward that is abandoned runs them all again.
    heard = (listener(part, name) for name, part in layer._modules.items())
    return next((each for each in heard if each is not None), None)


def _rotation(value: Any) -> RoPESite | None:
    try:
        site = ROTATIONS.get(value)
    except TypeError:  # unhashable, or nothing that can be referred to weakly
        return None
    return site if site is not None and site.calls.active and len(site.reading.signature.tensors) == 2 else None


def _rotations(forward: Any) -> list[RoPESite]:
    """Of the functions that a forward looks up in its module."""
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    names = names_used(forward)
    found = (_rotation(value) for name, value in forward.__globals__.items() if name in names)
    return [site for site in found if site is not None]


PATCH = Patch("qk_norm_rope", "triton", QK_NORM_ROPE, find, read_site, bind_site, needs=("rms_norm", "rope"))
