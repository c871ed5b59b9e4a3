"""Speculative decoding of models with gated delta nets: drafts of prompt lookup, of an assistant model, and of the head
of several tokens that is published beside Qwen3-Next and Qwen3.5. Opt-in.

Rebinds    in transformers' caches what records and takes back tokens; `_is_stateful` of the models, for which every
           kind of assisted generation is refused; in generation what makes a generator of drafts, and its loop; of its
           own head what takes the model and loads weights.
To         the same, with the recurrent state after each drafted token kept, and transformers' head made of this model.
Not when   transformers has other caches than 5.23, or a layer has a recurrent state that is not the gated delta rule's.
Delete     when transformers takes tokens back from recurrent states, and its configurations know of these heads.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.ops.rollback import ROLLBACK
from npu_patch.patches.inference.mtp import drafting, generator, head, rollback, stateful
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import replacement_for
from npu_patch.sites.sites import Site
from npu_patch.sites.whose import OWN, package

Serve = Callable[..., Any]
NAMED = AsNamed("drafts taken back")


@dataclass(frozen=True)
class Door:
    """`name` of the class `within`; `serve(original)` makes what serves it, `value(original, calls)` what takes its
    place where that is no function."""

    within: str
    name: str
    serve: Callable[[Serve], Serve] | None = None
    value: Callable[[Any, Calls], Any] | None = None


_LINEAR = "LinearAttentionCacheLayerMixin"
CACHES, GENERATION = "transformers.cache_utils", "transformers.generation.utils"
DRAFTS, LAYERS = "transformers.generation.candidate_generator", "transformers.modeling_layers"
DOORS = {
    CACHES: (
        Door(_LINEAR, "activate_past_recording", rollback.serve_recording),
        Door(_LINEAR, "crop", rollback.serve_crop),
        Door(_LINEAR, "is_croppable", value=rollback.croppable),
        Door("LinearAttentionLayer", "update_recurrent_state", rollback.serve_update),
    ),
    GENERATION: (
        Door("GenerationMixin", "_get_candidate_generator", drafting.serve_generator),
        Door("GenerationMixin", "_assisted_decoding", drafting.serve_loop),
    ),
    DRAFTS: (
        Door("MTPCandidateGenerator", "__init__", generator.serve_made),
        Door("MTPCandidateGenerator", "get_candidates", value=generator.candidates),
    ),
    LAYERS: (Door("MtpModel", "from_pretrained", value=generator.loading),),
}


_BOUND: dict[tuple[str, str], Calls] = {}


def _not_bound() -> str | None:
    """The first door that is not in place now."""
    for door in (door for doors in DOORS.values() for door in doors):
        calls = _BOUND.get((door.within, door.name))
        if calls is None or not calls.active:
            return f"{door.within}.{door.name} is not in place"
    return None


@dataclass
class _Calls(Calls):
    def deactivate(self) -> None:
        super().deactivate()
        head.forget()


def find(module: ModuleType) -> Iterable[Site]:
    """All of them or none: caches of older versions are cropped to a length, not by one."""
    lacking = _lacking()
    if lacking is not None:
        if module.__name__ == CACHES:
            yield Site(module, "", None, lacking)
        return
    if module.__name__ not in DOORS:
        yield from stateful.find(module)
    for door in DOORS.get(module.__name__, ()):
        owner = getattr(module, door.within)
        yield Site(owner, door.name, vars(owner)[door.name])


def _lacking() -> str | None:
    """The first door that this transformers does not have."""
    for name, doors in DOORS.items():
        for door in doors:
            try:
                owner = getattr(importlib.import_module(name), door.within, None)
            except ImportError:
                owner = None
            if owner is None or door.name not in vars(owner):
                return f"{name}.{door.within}.{door.name}"
    return None


def read_site(site: Site) -> AsNamed | NotRead:
    if site.original is None:
        return NotRead("this transformers has no such caches or drafts, 5.23 does", in_order=True)
    if callable(site.original) and package(site.original) not in ("transformers", OWN):
        return NotRead("it is not transformers' own")
    return NAMED


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement:
    calls = _Calls()
    if site.name == stateful.NAME:
        return Replacement(stateful.Stateful(calls, _not_bound, context.device_type), reading.name, calls)
    door = next(each for each in DOORS[site.owner.__module__] if each.name == site.name)
    _BOUND[door.within, door.name] = calls
    if door.value is not None:
        return Replacement(door.value(site.original, calls), reading.name, calls)
    assert door.serve is not None
    served = door.serve(site.original)
    return Replacement(replacement_for(site.original, calls, served, bypassed=Bypassed()), reading.name, calls)


PATCH = Patch(
    "mtp",
    "mtp",
    ROLLBACK,
    find,
    read_site,
    bind_site,
    layers=lambda site, context: None,
    tunable=False,
    needs=("gated_delta_net",),
    libraries=(*DOORS,),
    around=True,
)
