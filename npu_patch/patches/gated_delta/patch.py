"""Gated delta nets: the gated delta rule, the causal convolution and its update, wherever they are functions.

Rebinds    functions of modeling files, which layers look up at call time (transformers >= 5.15) or keep when they are
           made (<= 5.14); the functions that live layers of the given model have kept; and the convolution that those
           layers otherwise compute inline (inline_convolution.py). Those of other families are the same function.
To         MindSpeed's or fla's kernels where they are installed, take the call and pass a check on the device before
           their first use; else the chunked rule of ops/gated_delta/rule.py and ops/gated_delta/causal_conv1d.py.
           Single tokens to torch_npu's recurrent operator, where the switch `recurrent_bf16` asks for it.
Not when   the function decays every channel by its own gate (Kimi delta attention), or computes something else. The
           gates `g` and `beta` are computed inside the layer's forward, among its projections, and stay: no function
           there can be rebound. A call falls through for tensors on another device, subclasses and compilation.
Packing    `cu_seqlens` and `seq_idx` are honoured; a call that would run packed sequences into each other raises, as
           does a model given packed sequences of which these layers are not told (packing.py).
Delete     when transformers has a registration point for these functions and an NPU implementation in it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from npu_patch.ops.gated_delta.op import CAUSAL_CONV1D, CAUSAL_CONV1D_UPDATE, GATED_DELTA_RULE
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.patches.gated_delta import inline_convolution as door
from npu_patch.patches.gated_delta import packing
from npu_patch.patches.gated_delta.serve import serve
from npu_patch.patches.patch import AnyContext, Patch, Replacement, layers_of_class
from npu_patch.probe.gated_delta import CONVOLUTION, RULE, UPDATE, Reading, kind_of, parameters_of, read
from npu_patch.probe.gated_delta_checks import why_wrong
from npu_patch.serving.bypassed import CONVOLVED, MODULE_CALL, Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.dispatch import AnyDispatch, in_order
from npu_patch.serving.implementation import AnyImplementation
from npu_patch.serving.op import Op
from npu_patch.serving.replacement import replacement_for
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import Site, functions, innermost, unwrapped

IN_BFLOAT16 = "recurrent_bf16"
OPS: dict[str, Op[..., Any]] = {RULE: GATED_DELTA_RULE, CONVOLUTION: CAUSAL_CONV1D, UPDATE: CAUSAL_CONV1D_UPDATE}
# What transformers <= 5.14 binds from packages. They do not run on a CPU: that they are these very functions is what
# says what they compute.
PUBLISHED = {
    ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"): RULE,
    ("fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule"): RULE,
    ("causal_conv1d", "causal_conv1d_fn"): CONVOLUTION,
    ("causal_conv1d", "causal_conv1d_update"): UPDATE,
}
_OWN: WeakKeyDictionary[Callable[..., Any], Calls] = WeakKeyDictionary()


def find(module: ModuleType) -> Iterable[Site]:
    """Doors first: a layer is observed with the functions that it has of its own."""
    doors = list(door.find(module))
    candidates = [site for site in functions(module) if _is_candidate(site.original)]
    yield from (*doors, *candidates)
    rules = [site.name for site in candidates if _kind(site.original) == RULE]
    if rules:
        yield from packing.find(module, rules)


def in_layer(layer: torch.nn.Module) -> Iterable[Site]:
    """Functions that the layer has kept, unless one is a replacement already, from the modeling file."""
    for name, value in list(vars(layer).items()):
        if _is_candidate(value) and not _is_replaced(value):
            cls = type(layer)
            yield Site(layer, name, value, f"{cls.__module__}.{cls.__qualname__}.{name}")


def _is_candidate(value: Any) -> bool:
    return _kind(value) is not None


def _kind(value: Any) -> str | None:
    function = unwrapped(value)
    return None if function is None else kind_of(innermost(function))


def _is_replaced(value: Any) -> bool:
    function = unwrapped(value)
    calls = None if function is None else _OWN.get(function)
    return calls is not None and calls.active


def read_site(site: Site) -> Reading | AsNamed | NotRead:
    if site.name == "forward":
        return packing.WATCHED
    if isinstance(site.owner, type):
        return door.read(site.owner, site.name)
    function = innermost(unwrapped(site.original))
    reading = _published(function) or read(site.original, function)
    if isinstance(reading, NotRead):
        return reading.notable_if("delta" in site.name or "conv1d" in site.name)
    return reading


def bind_site(site: Site, reading: Reading | AsNamed, context: AnyContext) -> Replacement:
    if isinstance(reading, AsNamed):
        return packing.watch(site)
    if isinstance(site.owner, type):
        return _open_door(site, reading, context)
    calls, dispatch = Calls(), _dispatch(reading, context)
    served = serve(reading, dispatch, context.device_type, calls)
    replacement = replacement_for(site.original, calls, served, named_after=unwrapped(site.original))
    _OWN[replacement] = calls
    return Replacement(replacement, _variant(reading), calls, dispatch=dispatch)


def _open_door(site: Site, reading: Reading, context: AnyContext) -> Replacement:
    calls, dispatch = Calls(), _dispatch(reading, context)
    served = serve(reading, dispatch, context.device_type, calls, door.why_inline)
    bypassed = Bypassed.by(door.inline, CONVOLVED, MODULE_CALL)
    replacement = replacement_for(door.inline, calls, served, bypassed=bypassed)
    return Replacement(door.Door(site.name, replacement), CONVOLUTION, calls, dispatch=dispatch, within=(site.owner,))


def _dispatch(reading: Reading, context: AnyContext) -> AnyDispatch:
    check: Callable[..., str | None] = why_wrong if context.switches["self_check"] else _unchecked
    asked = context.switches[IN_BFLOAT16], context.switches.sources[IN_BFLOAT16]
    return in_order(OPS[reading.kind], context.device_type, check, *asked)


def _unchecked(implementation: AnyImplementation, call: Any) -> None:
    """What is wrong with it, if the user says that nothing is."""


def _published(function: Callable[..., Any]) -> Reading | None:
    for (module, name), kind in PUBLISHED.items():
        found = getattr(sys.modules.get(module), name, None)
        if found is not None and innermost(found) is function:
            names = parameters_of(function)
            return Reading(kind, names, {name: name for name in names}, (None, "silu", "swish"))
    return None


def _variant(reading: Reading) -> str:
    if reading.kind != RULE:
        return reading.kind
    return f"{RULE} over chunks" if "chunk_size" in reading.names else f"{RULE} by token"


def layers(site: Site, context: AnyContext) -> int | None:
    """The layer itself; of a module's function, the live layers that look it up when called or that have kept it."""
    if context.live is None or isinstance(site.owner, type):
        return layers_of_class(site, context)
    if isinstance(site.owner, torch.nn.Module):
        return 1
    return sum(_reaches(site, module) for module in context.live)


def _reaches(site: Site, layer: torch.nn.Module) -> bool:
    if type(layer).__module__ != site.owner.__name__:
        return False
    looked_up = site.name in names_used(type(layer).forward) and site.name not in vars(layer)
    current = vars(site.owner).get(site.name)
    return looked_up or (_is_replaced(current) and any(value is current for value in vars(layer).values()))


def is_served_rule(layer: torch.nn.Module, module: ModuleType | None) -> bool:
    """Whether each gated delta rule that the layer calls is ours: one that it has kept, or looks up in its module."""
    called = {name: vars(module).get(name) for name in names_used(type(layer).forward)} if module is not None else {}
    rules = [value for value in (called | vars(layer)).values() if _kind(value) == RULE]
    return bool(rules) and all(map(_is_replaced, rules))


PATCH: Patch[Reading | AsNamed, ..., Any] = Patch(
    "gated_delta_net",
    "fla",
    GATED_DELTA_RULE,
    find,
    read_site,
    bind_site,
    in_layer=in_layer,
    layers=layers,
    optional=IN_BFLOAT16,
    further_ops=(CAUSAL_CONV1D, CAUSAL_CONV1D_UPDATE),
    called=("delta_rule", "conv1d"),
)
