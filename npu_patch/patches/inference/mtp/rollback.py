"""Caches of linear attention that take tokens back: their layers keep the recurrent state after each token, from
`activate_past_recording()` on and after a first forward, the prompt's; `crop` goes on from one of them.

The convolution's states transformers keeps itself. What no rule of ours recorded is the original's, mamba's states say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch import Tensor

from npu_patch.ops.gated_delta.recorded import RECORDINGS, Recording, forget
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import TakenOver

Serve = Callable[..., Any]
_EXPECTED: WeakSet[Any] = WeakSet()  # layers of caches of models that are taken for ones without a state


def serve_recording(original: Serve) -> Serve:
    """`activate_past_recording()`."""

    def serve(layer: Any) -> None:
        original(layer)
        RECORDINGS.setdefault(layer, {})

    return serve


def serve_update(original: Serve) -> Serve:
    """`update_recurrent_state(states)`."""

    def serve(layer: Any, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Any:
        held = original(layer, recurrent_states, state_idx, **kwargs)
        recordings = RECORDINGS.get(layer)
        if recordings is None:
            return TakenOver(held)
        recordings.setdefault(state_idx, Recording()).go_on(recurrent_states, held)
        return held

    return serve


def serve_crop(original: Serve) -> Serve:
    """`crop(-tokens)`."""

    def serve(layer: Any, tokens_to_remove: int) -> Any:
        recordings = RECORDINGS.get(layer)
        if recordings is not None and not any(layer.has_previous_state.values()):
            return None  # it has seen nothing yet
        known = layer in _EXPECTED or (recordings and all(each.known for each in recordings.values()))
        if not recordings or tokens_to_remove > 0 or not known:
            return TakenOver(original(layer, tokens_to_remove))
        before = {index: each.before(-tokens_to_remove) for index, each in recordings.items()}
        original(layer, tokens_to_remove)
        if tokens_to_remove:
            for index, state in before.items():
                layer.recurrent_states[index].copy_(state)
        return None

    return serve


def croppable(original: property, calls: Calls) -> property:
    """`is_croppable`: whether the tokens after a prompt can be taken back."""

    def is_croppable(layer: Any) -> bool:
        if calls.active and RECORDINGS.get(layer):
            calls.ran += 1
            return True
        found: bool = original.__get__(layer, type(layer))
        return found

    return property(is_croppable)


def start(cache: Any) -> None:
    """What of the cache is not kept from now on is an error where it is asked for."""
    _EXPECTED.update(_with_states(cache))


def stop(cache: Any) -> None:
    """Nothing of the cache is kept any longer: whoever goes on with it may well not crop it again."""
    for layer in _with_states(cache):
        _EXPECTED.discard(layer)
        for state in layer.recurrent_states.values():
            forget(state)
        if RECORDINGS.pop(layer, None) is not None:
            layer.record_past = False


def _with_states(cache: Any) -> list[Any]:
    return [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "recurrent_states")]
