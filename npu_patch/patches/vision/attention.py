"""Vision attention: every layer of a tower that splits a row of images, or windows of them, by `cu_seqlens`.

Rebinds    `forward` of the class, with one that runs the original forward on the layer seen as one that asked for
           flash attention (npu_patch/waiting/as_flash.py): it then calls attention once, with lengths, in place of once
           for each segment. Projections (LoRA and all), rotation and norms stay the original's business.
To         the patched `AttentionInterface['flash_attention_2']`, which has the lengths on the host once per step.
Not when   the model asked for flash attention (it is one call already), or for another than transformers' sdpa. A call
           falls through under compilation, for tensors on another device, and for the operator's limits: the layer then
           runs anew, segment by segment.
Delete     when transformers' vision attention calls every attention function once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.attention.op import ATTENTION
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.patches.attention.patch import OWN_NAME, SDPA_NAME
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.probe.attention import REGISTRY
from npu_patch.probe.vision_attention import read_vision_attention
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import Unserved, replacement_for
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import Site, rebindable_forwards
from npu_patch.sites.whose import is_ours
from npu_patch.waiting.as_flash import FLASH, ONE_CALL, SEGMENTS, as_flash
from npu_patch.waiting.contract import Abandoned

LONGEST = "max_seqlen"


def find(module: ModuleType) -> Iterable[Site]:
    for site in rebindable_forwards(module):
        if SEGMENTS in inspect.signature(site.original).parameters and REGISTRY in names_used(site.original):
            yield site


def read_site(site: Site) -> AsNamed | NotRead:
    return read_vision_attention(site.owner)


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement:
    original, device_type, calls = site.original, context.device_type, Calls()
    names = list(inspect.signature(original).parameters)[1:]
    at_lengths = names.index(SEGMENTS)
    at_longest = names.index(LONGEST) if LONGEST in names else 0

    def serve(self: torch.nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return Unserved("being compiled")
        if hidden_states.device.type != device_type:
            return Unserved(f"input on {hidden_states.device.type}")
        asked = getattr(self.config, "_attn_implementation", None)
        if asked not in (SDPA_NAME, OWN_NAME):
            return Unserved(f"its attention is {asked}")
        lengths = kwargs.get(SEGMENTS, args[at_lengths - 1] if len(args) >= at_lengths else None)
        if not isinstance(lengths, Tensor):
            return Unserved(f"no {SEGMENTS}")
        if not _is_served():
            return Unserved(f"nothing of npu_patch stands under {FLASH}")
        if at_longest and kwargs.get(LONGEST) is None and len(args) < at_longest:
            # No segment is longer than the row; else each layer asks the device for the longest.
            kwargs = {**kwargs, LONGEST: hidden_states.shape[-2]}
        try:
            return original(as_flash(self), hidden_states, *args, **kwargs)
        except Abandoned as problem:
            return Unserved(str(problem))

    return Replacement(replacement_for(original, calls, serve, bypassed=Bypassed()), reading.name, calls)


def _is_served() -> bool:
    from transformers.modeling_utils import AttentionInterface

    function: Any = AttentionInterface._global_mapping.get(FLASH)
    while function is not None and is_ours(function):
        if (calls := ONE_CALL.get(function)) is not None:
            return calls.active
        function = getattr(function, "__wrapped__", None)  # ours for paged caches stands around it
    return False


PATCH = Patch(
    "vision_attention",
    "vision_attention",
    ATTENTION,
    find,
    read_site,
    bind_site,
    tunable=False,
    needs=("attention",),
    optional="head_padding",
)
