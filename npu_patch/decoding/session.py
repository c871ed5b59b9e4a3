"""One call of generate(): what its loop is given for the model, and how each of its steps runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from npu_patch.decoding import cache as caches
from npu_patch.decoding import inputs
from npu_patch.decoding.host_state import observe
from npu_patch.decoding.inputs import StepInputs
from npu_patch.decoding.kept import KEPT, KeptStep, Lease
from npu_patch.decoding.step import Step, cache_name_of
from npu_patch.serving.calls import Calls

STEP = "decode_step"


class Session:
    """`lease`: the cache, where it is ours. `watched`: code of others runs between the steps, and may change the model.
    `kept` is what serves the call, once its first step has looked for it; `why_not`, why its steps are eager.
    `grown`: the arguments of the next step, as the loop does not have them: it lets them grow where a step is eager."""

    def __init__(self, model: Any, device_type: str, calls: Calls, lease: Lease | None, watched: bool) -> None:
        self.model, self.device_type, self.calls, self.lease, self.watched = model, device_type, calls, lease, watched
        self.prefilled = False
        self.room = 0
        self.kept: KeptStep | None = None
        self.why_not: str | None = None
        self.nothing_captured: str | None = None  # why a step of this call could not be
        self.outputs: Any = None
        self.owed = 0
        self.grown: dict[str, Any] | None = None
        self.keywords: dict[str, Any] = {}

    def prepare(self, tokens: Tensor, **kwargs: Any) -> dict[str, Any]:
        if not self.prefilled:
            return dict(self.model.prepare_inputs_for_generation(tokens, **kwargs))
        return {STEP: (tokens, kwargs)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*kwargs[STEP]) if STEP in kwargs else self.model(*args, **kwargs)

    def update(self, outputs: Any, kwargs: dict[str, Any], **keywords: Any) -> dict[str, Any]:
        self.prefilled = True
        if outputs is self.outputs:
            self.owed, self.keywords = self.owed + 1, keywords
            self.grown = kwargs if self.grown is None else self.grown
            return kwargs
        kwargs, self.grown = (kwargs if self.grown is None else self.grown), None
        return dict(self.model._update_model_kwargs_for_generation(outputs, kwargs, **keywords))

    def _step(self, tokens: Tensor, kwargs: dict[str, Any]) -> Any:
        if self.kept is None or self.watched or not self.calls.active:
            kwargs = self._caught_up(kwargs)
            self._look(tokens, kwargs)
        if self.why_not is None and self.room == 0:
            self._refuse("the cache is full")
        self.room -= 1
        if self.why_not is not None or self.kept is None:
            return self._eager(tokens, self._caught_up(kwargs))
        if self.kept.step.is_proven:
            return self._replayed(self.kept.step, tokens, kwargs)
        return self._proved(self.kept, tokens, self._caught_up(kwargs))

    def _look(self, tokens: Tensor, kwargs: dict[str, Any]) -> None:
        """For the step that is captured for this call, or is to be; anew where the model has changed."""
        if self.why_not is not None:
            return
        observed = observe(self.model, self.device_type)
        reason = observed.why_not or why_not_now(self.device_type)
        if not self.calls.active or reason is not None:
            return self._refuse(reason or "restored meanwhile")
        key = (inputs.shape_of(tokens, kwargs), mode(self.device_type))
        if self.kept is not None and self.kept.observed.state == observed.state and self.kept.key[1] == key[1]:
            return
        cache = kwargs[cache_name_of(kwargs)]
        if self.kept is None:
            self.room = caches.length_of(cache) - self._tokens_seen(tokens, kwargs)
        self.outputs = None
        self.kept = KEPT.of(self.model).step(key, observed, cache)
        if self.kept.why_not is not None:
            return self._refuse(self.kept.why_not)

    def _proved(self, kept: KeptStep, tokens: Tensor, kwargs: dict[str, Any]) -> Any:
        inputs_of = partial(StepInputs.of, length=caches.length_of(kwargs[cache_name_of(kwargs)]))
        now = partial(observe, self.model, self.device_type)
        outputs, reason = kept.prove(self._eager, tokens, kwargs, inputs_of, now)
        if reason is not None:
            self.nothing_captured = reason
            self._refuse(reason)
        return outputs

    def _replayed(self, step: Step, tokens: Tensor, kwargs: dict[str, Any]) -> Any:
        assert step.inputs is not None and step.graph is not None
        if self.outputs is None:
            step.inputs.load(tokens, kwargs)
            cache_name = cache_name_of(kwargs)
            self.outputs = step.outputs_with(cache_name, kwargs[cache_name])
        else:
            step.inputs.take(tokens)
        step.graph.replay()
        self.calls.ran += 1
        return self.outputs

    def _tokens_seen(self, tokens: Tensor, kwargs: dict[str, Any]) -> int:
        if self.lease is not None and kwargs.get("inputs_embeds") is None:
            return tokens.shape[1] - 1
        return caches.tokens_in(kwargs[cache_name_of(kwargs)])

    def _refuse(self, reason: str) -> None:
        self.why_not = reason
        self.calls.fell_through[reason] += 1

    def _eager(self, tokens: Tensor, kwargs: Mapping[str, Any]) -> Any:
        return self.model(**self.model.prepare_inputs_for_generation(tokens, **kwargs), return_dict=True)

    def _caught_up(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments with all that replays let grow by themselves."""
        for _ in range(self.owed):
            assert self.grown is not None
            self.grown = self.model._update_model_kwargs_for_generation(self.outputs, self.grown, **self.keywords)
        self.owed = 0
        return kwargs if self.grown is None else {**kwargs, **self.grown}


class Steps(Protocol):
    """What a loop of generate() is given for its model."""

    model: Any

    def prepare(self, tokens: Tensor, **kwargs: Any) -> dict[str, Any]: ...

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...

    def update(self, outputs: Any, kwargs: dict[str, Any], **keywords: Any) -> dict[str, Any]: ...


class ModelOfLoop:
    """The model, to the loop of generate(), but for its steps."""

    def __init__(self, session: Steps) -> None:
        vars(self)["_session"] = session

    @property  # type: ignore[misc]
    def __class__(self) -> type:
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
