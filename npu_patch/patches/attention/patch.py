"""Attention: what transformers' registries hold under `sdpa` and `flash_attention_2`, and a name of our own, `npu`.

Rebinds    entries of `AttentionInterface` and `AttentionMaskInterface`, which every model looks up at call time, and
           the functions of masking_utils that read packed position ids and prepare padding masks.
To         `npu_fusion_attention`, with masks as patterns wherever transformers makes them from patterns; single tokens
           beside a cache that need no backward to `npu_fused_infer_attention_score`.
           The operator keeps its result for the backward: a layer that changes it in place gets a copy.
Not when   the model's attention is eager, flex or its own. A call falls through for softcap, requested attention
           weights, paged caches, compilation, tensors on another device and the operator's limits.
Delete     when transformers' sdpa on NPU keeps additive masks and makes no mask for windows and packed sequences, and
           its flash attention there honours windows and sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

from npu_patch.ops.attention.op import ATTENTION
from npu_patch.ops.prefetch import FOLLOWING, while_fetching
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.patches.attention import flash as attention_flash
from npu_patch.patches.attention import mask as attention_mask
from npu_patch.patches.attention import sdpa as attention_sdpa
from npu_patch.patches.attention.checked import Attend, checks
from npu_patch.patches.attention.flash import read_flash
from npu_patch.patches.patch import Context, Patch, Replacement, by_nobody_known
from npu_patch.probe.attention import REGISTRY, read_attention, read_mask, read_packing, read_preparing
from npu_patch.serving.bypassed import SDPA
from npu_patch.serving.calls import Calls
from npu_patch.serving.changed_later import Callers
from npu_patch.serving.dispatch import no_cases
from npu_patch.serving.replacement import replacement_for
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import Site, forwards, innermost
from npu_patch.waiting.as_flash import FLASH, ONE_CALL, is_as_flash
from npu_patch.waiting.contract import Abandoned, materialised

SDPA_NAME, OWN_NAME = "sdpa", "npu"


@dataclass(frozen=True)
class Door:
    """One place where transformers lets attention be replaced: `holder()[name]`, or an attribute of a module.

    `read(original)` observes whether it is what it should be; `serve(original, device_type, attend)` makes what
    takes its place; `stands_for`: the entry whose original it calls, for a name that transformers does not have.
    """

    described: str
    holder: Callable[[], MutableMapping | ModuleType]
    name: str
    read: Callable[[Any], AsNamed | NotRead]
    serve: Callable[[Any, str, Attend], Callable[..., Any]]
    stands_for: str | None = None


def _attention_entries() -> MutableMapping:
    from transformers.modeling_utils import AttentionInterface

    return AttentionInterface._global_mapping


def _mask_entries() -> MutableMapping:
    from transformers.masking_utils import AttentionMaskInterface

    return AttentionMaskInterface._global_mapping


def _masking_utils() -> ModuleType:
    from transformers import masking_utils

    return masking_utils


def _read_own_name(function: Callable[..., Any]) -> AsNamed | NotRead:
    """transformers makes no mask at all for an attention whose name has no mask function."""
    mask, attention = read_mask(_mask_entries()["sdpa"]), read_attention(function)
    if isinstance(mask, NotRead) and isinstance(attention, AsNamed):
        return NotRead(f"no mask can be made for this name: {mask.reason}")
    return attention


_PACKING, _PREPARING = "find_packed_sequence_indices", "_preprocess_mask_arguments"
DOORS: tuple[Door, ...] = (
    Door("AttentionInterface['sdpa']", _attention_entries, SDPA_NAME, read_attention, attention_sdpa.serve),
    Door("AttentionInterface['npu']", _attention_entries, OWN_NAME, _read_own_name, attention_sdpa.serve, SDPA_NAME),
    Door(f"AttentionInterface['{FLASH}']", _attention_entries, FLASH, read_flash, attention_flash.serve),
    Door("AttentionMaskInterface['sdpa']", _mask_entries, SDPA_NAME, read_mask, attention_mask.serve),
    Door("AttentionMaskInterface['npu']", _mask_entries, OWN_NAME, read_mask, attention_mask.serve, SDPA_NAME),
    Door(f"masking_utils.{_PACKING}", _masking_utils, _PACKING, read_packing, attention_mask.serve_packing),
    Door(f"masking_utils.{_PREPARING}", _masking_utils, _PREPARING, read_preparing, attention_mask.serve_preparing),
)
ATTENDING = tuple(door.name for door in DOORS if door.holder is _attention_entries)
_BY_DESCRIPTION = {door.described: door for door in DOORS}


def registered() -> Iterable[Site]:
    for door in DOORS:
        holder = door.holder()
        names = vars(holder) if isinstance(holder, ModuleType) else holder
        original = names.get(door.stands_for or door.name)
        if original is not None:
            yield Site(holder, door.name, original, door.described)


def read_site(site: Site) -> AsNamed | NotRead:
    door = _BY_DESCRIPTION[site.described]
    if door.stands_for is not None and door.name in site.owner:
        return NotRead(f"another package has registered the name {door.name!r}")
    replaced = SDPA.replaced()
    return door.read(site.original) if replaced is None else NotRead(replaced)


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement:
    door, calls = _BY_DESCRIPTION[site.described], Calls()

    def original(*args: Any, **kwargs: Any) -> Any:
        """What falls through sees masks, not patterns. A vision layer that asked for one call is run anew instead."""
        if args and is_as_flash(args[0]):
            raise Abandoned(f"a call of {door.described} fell through")
        return site.original(*materialised(args, "the original"), **materialised(kwargs, "the original"))

    attends = door.holder is _attention_entries
    dispatch = context.dispatch(partial(checks, door.name) if attends else no_cases)
    serve = door.serve(site.original, context.device_type, Attend(dispatch, calls))
    if attends:
        serve = _with_a_result_to_change(serve, calls)
    function = replacement_for(original, calls, serve, named_after=site.original)
    if door.name == FLASH:
        ONE_CALL[function] = calls
    looked_up_by = partial(_why_asked, door.name) if attends else by_nobody_known
    return Replacement(function, reading.name, calls, dispatch=dispatch, looked_up_by=looked_up_by)


def layers_asking(model: torch.nn.Module) -> Iterable[torch.nn.Module]:
    """The live layers that ask AttentionInterface for one of `ATTENDING`."""
    for layer in model.modules():
        asked = getattr(getattr(layer, "config", None), "_attn_implementation", None)
        if asked in ATTENDING and REGISTRY in names_used(type(layer).forward):
            yield layer


def _why_asked(name: str, model: torch.nn.Module) -> str | None:
    asked = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return f"the model's attention implementation is {name}" if asked == name else None


def _with_a_result_to_change(serve: Callable[..., Any], calls: Calls) -> Callable[..., Any]:
    callers = Callers()

    def kept(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        fetching = len(FOLLOWING)  # none but where the preparation prefetch has been: no frame is added
        result = while_fetching(serve, module, *args, **kwargs) if fetching else serve(module, *args, **kwargs)
        if type(result) is not tuple or torch.compiler.is_compiling() or not result[0].requires_grad:
            return result
        changed = callers.why_changed_later(module, (), result=True)
        if changed is None:
            return result
        calls.declined["the result itself"] = f"a copy is returned: {changed}"
        return result[0].clone(), *result[1:]

    return kept


def find(module: ModuleType) -> Iterable[Site]:
    """No site is in modeling code."""
    return ()


def customers(module: ModuleType) -> Iterable[type]:
    """Layers whose forward asks AttentionInterface, which modeling files hold under one name."""
    for site in forwards(module):
        if REGISTRY in innermost(site.original).__code__.co_names:
            yield site.owner


PATCH = Patch(
    "attention",
    "sdpa",
    ATTENTION,
    find,
    read_site,
    bind_site,
    registered,
    customers=customers,
    optional="head_padding",
)
