"""One call of generate(): what its loop is given for the model, and how each of its steps runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npu_patch.decoding import cache as caches
from npu_patch.decoding import inputs
from npu_patch.decoding.host_state import observe
from npu_patch.decoding.kept import KEPT, KeptStep
from npu_patch.decoding.step import cache_name_of, prove
from npu_patch.serving.calls import Calls

STEP = "decode_step"


class Session:
    """`own`: the cache is ours. `watched`: code of others runs between the steps, and may change the model.
    `grown`: the arguments of the next step, as the loop does not have them: it lets them grow only where a step is
    eager."""

    def __init__(self, model: Any, device_type: str, calls: Calls, own: bool, watched: bool) -> None:
        self.model, self.device_type, self.calls, self.own, self.watched = model, device_type, calls, own, watched
        self.prefilled = False
        self.room = 0
        self.kept: KeptStep | None = None
        self.why_not: str | None = None
        self.outputs: Any = None
        self.owed, self.grown, self.keywords = 0, None, {}
        self.state: Any = None

    def prepare(self, tokens: Tensor, **kwargs: Any) -> dict[str, Any]:
        if not self.prefilled:
            return dict(self.model.prepare_inputs_for_generation(tokens, **kwargs))
        return {STEP: (tokens, kwargs)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.step(*kwargs[STEP]) if STEP in kwargs else self.model(*args, **kwargs)

    def update(self, outputs: Any, kwargs: dict[str, Any], **keywords: Any) -> dict[str, Any]:
        self.prefilled = True
        if outputs is self.outputs:
            self.owed, self.grown, self.keywords = self.owed + 1, kwargs, keywords
            return kwargs
        kwargs, self.grown = (kwargs if self.grown is None else self.grown), None
        return dict(self.model._update_model_kwargs_for_generation(outputs, kwargs, **keywords))

    def step(self, tokens: Tensor, kwargs: dict[str, Any]) -> Any:
        kept = self.kept
        if kept is None or self.watched or not self.calls.active:
            kwargs = self._caught_up(kwargs)
            kept = self._look(tokens, kwargs)
        if self.why_not is None and self.room > 0:
            self.room -= 1
            if kept.step.is_proven:
                return self._replayed(kept, tokens, kwargs)
            kwargs = self._caught_up(kwargs)
            outputs, reason = prove(
                kept.step,
                self.model,
                tokens,
                kwargs,
                lambda: self._eager(tokens, kwargs),
                KEPT.pool(self.device_type),
                caches.length_of(kwargs[cache_name_of(kwargs)]),
            )
            if reason is not None:
                kept.why_not = reason
                kept.step.graph = kept.step.inputs = None
                self._refuse(reason)
            return outputs
        return self._eager(tokens, self._caught_up(kwargs))

    def _look(self, tokens: Tensor, kwargs: dict[str, Any]) -> Any:
        """The step that is captured for this call, or is to be; anew where the model has changed."""
        if not self.calls.active:
            self.why_not = self.why_not or "restored meanwhile"
        if self.why_not is not None:
            return self.kept
        observed = observe(self.model, self.device_type)
        reason = observed.why_not or why_not_now(self.device_type)
        if reason is not None:
            return self._refuse(reason)
        if self.kept is None:
            self.room = caches.length_of(kwargs[cache_name_of(kwargs)]) - self._tokens_seen(tokens, kwargs)
        elif self.kept.state == observed.state:
            return self.kept
        cache_name = cache_name_of(kwargs)
        key = (inputs.shape_of(tokens, kwargs), mode(self.device_type))
        self.kept = KEPT.of(self.model).step(key, observed.state, kwargs[cache_name])
        self.outputs = None
        if self.kept.why_not is not None:
            self._refuse(self.kept.why_not)
        elif self.kept.step.is_proven:
            self._begin(tokens, kwargs)
        return self.kept

    def _begin(self, tokens: Tensor, kwargs: dict[str, Any]) -> None:
        step, cache_name = self.kept.step, cache_name_of(kwargs)
        step.inputs.load(tokens, kwargs)
        self.outputs = step.outputs_with(cache_name, kwargs[cache_name])

    def _replayed(self, kept: KeptStep, tokens: Tensor, kwargs: dict[str, Any]) -> Any:
        if self.outputs is None:
            self._begin(tokens, kwargs)
        else:
            kept.step.inputs.take(tokens)
        kept.step.graph.replay()
        self.calls.ran += 1
        return self.outputs

    def _tokens_seen(self, tokens: Tensor, kwargs: dict[str, Any]) -> int:
        if self.own and kwargs.get("inputs_embeds") is None:
            return tokens.shape[1] - 1
        return caches.tokens_in(kwargs[cache_name_of(kwargs)])

    def _refuse(self, reason: str) -> None:
        self.why_not = reason
        self.calls.fell_through[reason] += 1

    def _eager(self, tokens: Tensor, kwargs: dict[str, Any]) -> Any:
        return self.model(**self.model.prepare_inputs_for_generation(tokens, **kwargs), return_dict=True)

    def _caught_up(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with all that replays let grow by themselves."""
        for _ in range(self.owed):
            self.grown = self.model._update_model_kwargs_for_generation(self.outputs, self.grown, **self.keywords)
        self.owed = 0
        return kwargs if self.grown is None else {**kwargs, **self.grown}


class ModelOfLoop:
    """The model, to the loop of generate(), but for its steps."""

    def __init__(self, session: Session) -> None:
        vars(self)["_session"] = session

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._session.model)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_session"].model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_session"].model, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._session.forward(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._session.prepare(*args, **kwargs)

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self._session.update(*args, **kwargs)

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        return False


def mode(device_type: str) -> tuple[Any, ...]:
    """Of torch, which a capture freezes."""
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
    )


def why_not_now(device_type: str) -> str | None:
    if torch.is_grad_enabled():
        return "gradients are wanted"
    if torch.get_device_module(device_type).is_current_stream_capturing():
        return "within a capture"
    return None


Loop = Callable[..., Any]
