"""generate() over a static cache: each step of its loop is one replay of a graph, and each check of drafts.

`_sample` is given an object in place of the model that passes everything on to it, but for the steps of the loop. A
call whose cache transformers made for it alone gets one that is kept, so that its graph is there already.
`_assisted_decoding`, which knows no static caches, is given one that takes tokens back (decoding/draft_cache.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch.decoding import cache as caches
from npu_patch.decoding import inputs
from npu_patch.decoding.checks import WIDEST, Checks, ModelOfDrafts
from npu_patch.decoding.host_state import Observed, observe
from npu_patch.decoding.kept import KEPT, Lease
from npu_patch.decoding.session import ModelOfLoop, Session, mode, why_not_now
from npu_patch.decoding.turns import turn
from npu_patch.ops.decode_step import DECODE_STEP
from npu_patch.ops.readings import AsNamed
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import TakenOver, Unserved, replacement_for
from npu_patch.sites.sites import Site

LIBRARY, MIXIN = "transformers.generation.utils", "GenerationMixin"
SAMPLE, BEAMS, ASSISTED = "_sample", "_beam_search", "_assisted_decoding"
OF_LOOP = ("generation_config", "logits_processor", "stopping_criteria", "streamer", "synced_gpus")
OF_DRAFTS = ("inputs_tensor", "assistant_model", "assistant_tokenizer", "tokenizer")
ASKED_FOR = ("output_attentions", "output_hidden_states")
# Of transformers, but they call what a caller gave them.
CALLING_OTHERS = ("PrefixConstrainedLogitsProcessor",)


@dataclass
class _Calls(Calls):
    """Counts replays, and calls of generate() that fell through."""

    def deactivate(self) -> None:
        super().deactivate()
        KEPT.forget()


def find(module: ModuleType) -> Iterable[Site]:
    mixin = vars(module).get(MIXIN)
    if module.__name__ == LIBRARY and isinstance(mixin, type):
        for name in (SAMPLE, BEAMS, ASSISTED):
            if isinstance(vars(mixin).get(name), FunctionType):
                yield Site(mixin, name, vars(mixin)[name])


def read_site(site: Site) -> AsNamed:
    """Whatever a model's step computes is compared with it when it is captured."""
    return AsNamed("steps of generate()")


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement:
    calls = _Calls()
    serve = _SERVING[site.name](site.original, context.device_type, calls)
    function = replacement_for(site.original, calls, serve, bypassed=Bypassed())
    return Replacement(function, reading.name, calls)


def _beams(original: Callable[..., Any], device_type: str, calls: Calls) -> Callable[..., Any]:
    def serve(*args: Any, **kwargs: Any) -> Unserved | TakenOver:
        static = caches.why_not(_cache_of(kwargs)) is None
        return Unserved("beam search reorders the cache") if static else TakenOver(original(*args, **kwargs))

    return serve


def _captured(original: Callable[..., Any], device_type: str, calls: Calls) -> Callable[..., Any]:
    def serve(model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Unserved | TakenOver:
        reason = _why_not(model, input_ids, args, kwargs, device_type)
        if reason is not None:
            return Unserved(reason)
        observed = observe(model, device_type)
        if observed.why_not is not None:
            return Unserved(observed.why_not)
        with turn(device_type) as taken:
            lease = _lease(model, input_ids, kwargs, observed, device_type) if taken is None else taken
            if isinstance(lease, str):
                return Unserved(lease)
            session = Session(model, device_type, calls, lease, _others_between(kwargs))
            try:
                return TakenOver(original(ModelOfLoop(session), input_ids, *args, **kwargs))
            finally:
                if lease is not None:
                    lease.in_use = False
                    if session.nothing_captured is not None:
                        KEPT.of(model).refuse(lease, observed, session.nothing_captured)

    return serve


def _drafted(original: Callable[..., Any], device_type: str, calls: Calls) -> Callable[..., Any]:
    """Over a static cache of this call alone. Where its checks cannot be captured they are eager: without a cache that
    takes tokens back the call would be refused."""

    def serve(model: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> Unserved | TakenOver:
        if caches.why_not(_cache_of(kwargs)) is not None:
            return TakenOver(original(model, input_ids, *args, **kwargs))
        reason = _why_not_drafts(model, args, kwargs)
        if reason is not None:
            return Unserved(reason)
        with turn(device_type) as taken:
            observed = observe(model, device_type)
            reason = taken or _why_not(model, input_ids, args, kwargs, device_type) or observed.why_not
            kind = (ASSISTED, input_ids.shape[0], input_ids.device, observed.dtypes, mode(device_type))
            reason = reason or KEPT.of(model).why_not(kind, observed)
            lease = _lease_for_drafts(model, input_ids, kwargs, kind, kept=reason is None)
            if isinstance(lease, str):
                return Unserved(lease)
            checks = Checks(model, device_type, calls, lease.cache, _others_between(kwargs), reason)
            lease.cache.why_eager = reason or ("code of others runs between the checks" if checks.watched else None)
            config = copy.copy(kwargs["generation_config"])
            config.cache_implementation = None  # transformers' loop looks at its name
            given = {**kwargs, _name_of_cache(kwargs): lease.cache, "generation_config": config}
            lease.cache.serves = True
            try:
                found = original(ModelOfDrafts(checks), input_ids, **given)
                if config.return_dict_in_generate:
                    lease.cache.end()
                return TakenOver(found)
            finally:
                lease.in_use = lease.cache.serves = False
                if checks.nothing_captured is not None:
                    KEPT.of(model).refuse(lease, observed, checks.nothing_captured)

    return serve


def _why_not_drafts(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    config = kwargs.get("generation_config")
    if args or config is None or not isinstance(model, torch.nn.Module):
        return "arguments of another version of transformers"
    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder and a decoder"
    if kwargs.get("synced_gpus"):
        return "ranks that generate in step"
    if not caches.is_for_one_call(_cache_of(kwargs), config.cache_implementation, model):
        return "drafts over a static cache that is the caller's, or was filled before"
    if not hasattr(_cache_of(kwargs), "activate_past_recording"):
        return "this transformers takes tokens back another way, 5.23 is known"
    return None


def _lease_for_drafts(
    model: Any, input_ids: Tensor, kwargs: dict[str, Any], kind: tuple[Any, ...], kept: bool
) -> Lease | str:
    """A cache that takes tokens back, kept for the next call but where the caller gets it, or nothing is captured."""
    from npu_patch.decoding import draft_cache

    text, config = model.config.get_text_config(decoder=True), kwargs["generation_config"]
    length = max(caches.length_of(_cache_of(kwargs)), config.max_length - 1) + WIDEST

    def make(length: int) -> Any:
        return draft_cache.made(text, length, input_ids.device)

    if kept and not config.return_dict_in_generate:
        lease = KEPT.of(model).lease(length, kind, make)
        if isinstance(lease, Lease):
            return lease
    cache = make(length)
    return cache if isinstance(cache, str) else Lease(cache, kind)


def _lease(
    model: Any, input_ids: Tensor, kwargs: dict[str, Any], observed: Observed, device_type: str
) -> Lease | str | None:
    """A cache of ours, in the place of one that transformers made for this call; or why the call is left alone. None
    where the cache is the caller's."""
    name, config = _name_of_cache(kwargs), kwargs["generation_config"]
    if config.return_dict_in_generate:
        return None
    if not caches.is_for_one_call(kwargs[name], config.cache_implementation, model):
        return None
    of_model = KEPT.of(model)
    kind = (input_ids.shape[0], input_ids.device, observed.dtypes, mode(device_type))
    reason = of_model.why_not(kind, observed)
    if reason is not None:
        return reason
    embedded = kwargs.get("inputs_embeds")
    length = max(caches.length_of(kwargs[name]), config.max_length - 1)
    length += 0 if embedded is None else embedded.shape[1]
    lease = of_model.lease(length, kind, partial(caches.made, model.config.get_text_config(decoder=True)))
    if isinstance(lease, Lease):
        kwargs[name] = lease.cache
    return lease


def _why_not(model: Any, input_ids: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device_type: str) -> str | None:
    config = kwargs.get("generation_config")
    if args or config is None or not isinstance(model, torch.nn.Module):
        return "arguments of another version of transformers"
    reason = caches.why_not(_cache_of(kwargs))
    if reason is not None:
        return reason
    if not isinstance(input_ids, Tensor) or input_ids.device.type != device_type:
        return f"tokens that are not on {device_type}"
    if getattr(model.config, "is_encoder_decoder", False):
        return "an encoder and a decoder"
    if kwargs.get("synced_gpus"):
        return "ranks that generate in step"
    if config.compile_config is not None:
        return "torch.compile is asked for (compile_config)"
    if any(getattr(config, name, False) for name in ASKED_FOR):
        return "attentions or hidden states are asked for"
    of_model = {name: value for name, value in kwargs.items() if name not in (*OF_LOOP, *OF_DRAFTS)}
    return why_not_now(device_type) or inputs.why_not(of_model)


def _cache_of(kwargs: dict[str, Any]) -> Any:
    return next((kwargs[name] for name in inputs.CACHES if kwargs.get(name) is not None), None)


def _name_of_cache(kwargs: dict[str, Any]) -> str:
    return next(name for name in inputs.CACHES if kwargs.get(name) is not None)


def _others_between(kwargs: dict[str, Any]) -> bool:
    """Whether code that is not of transformers runs between the steps."""
    between = [*(kwargs.get("logits_processor") or ()), *(kwargs.get("stopping_criteria") or ())]
    between += [kwargs["streamer"]] if kwargs.get("streamer") is not None else []
    kinds: Iterator[type] = (type(each) for each in between)
    return any(not kind.__module__.startswith("transformers.") or kind.__name__ in CALLING_OTHERS for kind in kinds)


_SERVING = {SAMPLE: _captured, BEAMS: _beams, ASSISTED: _drafted}
PATCH = Patch(
    "captured_decode",
    "captured_decode",
    DECODE_STEP,
    find,
    read_site,
    bind_site,
    layers=lambda site, context: None,
    libraries=(LIBRARY,),
    tunable=False,
    around=True,
)
