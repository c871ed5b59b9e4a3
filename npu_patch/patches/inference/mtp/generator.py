"""transformers' generator of drafts by a head, for models whose configuration knows of none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from npu_patch.patches.inference.mtp import head
from npu_patch.patches.inference.mtp.stateful import is_rolled_back
from npu_patch.patches.inference.mtp.trunk import Trunk
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import TakenOver, replacement_for

Serve = Callable[..., Any]
_MODELS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of generators
NOT_ASKED = 20  # transformers' own default of num_assistant_tokens, which its own heads do not look at
MOST = 16
WHOLE = "use_mtp=True: a head reads the whole prompt, as tokens, within the call; this one {}"


def serve_made(original: Serve) -> Serve:
    """`MTPCandidateGenerator(main_model, ...)`."""

    def serve(made: Any, main_model: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_rolled_back(main_model):
            return TakenOver(original(made, main_model, generation_config, model_kwargs, *args, **kwargs))
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            raise ValueError(WHOLE.format(f"goes on from a cache of {int(cache.get_seq_length())} tokens"))
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(WHOLE.format("has inputs_embeds"))
        asked = generation_config.num_assistant_tokens
        drafts = 1 if asked in (None, NOT_ASKED) else _drafts(asked)
        # A head whose drafts were wrong is given them anew, back to where they began.
        trunk = head.trunk_of(main_model, min(drafts, model_kwargs["position_ids"].shape[-1]))
        _MODELS[made] = main_model
        return original(made, trunk, generation_config, model_kwargs, *args, **kwargs)

    return serve


def _drafts(asked: Any) -> int:
    if not isinstance(asked, int) or isinstance(asked, bool) or not 1 <= asked <= MOST:
        raise ValueError(f"num_assistant_tokens={asked!r} with use_mtp=True: accepted are 1 to {MOST} drafts")
    return asked


def candidates(original: Serve, calls: Calls) -> Serve:
    """`get_candidates(input_ids, model_kwargs, ...)`: positions of several axes, those of images, as those of text; and
    over a static cache, drafts that are replays, which are counted."""

    def serve(made: Any, input_ids: Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        reason = _begin(made, model_kwargs, calls) if kwargs.get("is_first_iteration") else None
        if reason is not None:
            calls.fell_through[reason] += 1
        positions = model_kwargs.get("position_ids")
        if positions is not None and positions.dim() == 3:
            rotated = positions[1 if positions.shape[0] == 4 else 0]
            model_kwargs = {**model_kwargs, "position_ids": rotated}
        return TakenOver(original(made, input_ids, model_kwargs, *args, **kwargs))

    return replacement_for(original, calls, serve, bypassed=Bypassed())


def _begin(made: Any, model_kwargs: dict[str, Any], calls: Calls) -> str | None:
    """Why drafts over a static cache are not to be replays."""
    model, cache = _MODELS.get(made), model_kwargs["past_key_values"]
    if model is None or not hasattr(cache, "why_eager"):
        return None
    from npu_patch.patches.inference.mtp import captured_head

    return captured_head.begin(made, model, cache, calls)


def loading(original: Any, calls: Calls) -> Any:
    """`MtpModel.from_pretrained(main_model, ...)`."""

    def from_pretrained(cls: type, main_model: Any, device_map: Any = None, **kwargs: Any) -> Any:
        def load(kind: type) -> Any:
            return original.__func__(kind, main_model, device_map=device_map, **kwargs)

        if not calls.active or not isinstance(main_model, Trunk):
            return load(cls)
        calls.ran += 1
        return head.keep(main_model, device_map, load)

    return classmethod(from_pretrained)
