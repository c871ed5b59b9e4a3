"""One call of generate() with drafts, over a cache that takes them back: each check of its loop is one replay.

Graphs have few widths, powers of two up to WIDEST: a check is filled up with tokens that nobody looks at, and of longer
drafts the first ones are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from npu_patch.decoding import cache as caches
from npu_patch.decoding import inputs
from npu_patch.decoding.host_state import observe
from npu_patch.decoding.inputs import StepInputs
from npu_patch.decoding.kept import KEPT, KeptStep
from npu_patch.decoding.session import ModelOfLoop, mode, why_not_now
from npu_patch.decoding.step import Run, Step, cache_name_of
from npu_patch.serving.calls import Calls

CHECK = "check_of_drafts"
WIDEST = 32


class Checks:
    """`watched`: code of others runs between the checks, and may change the model. `why_not`: why they are eager, once
    that is known."""

    def __init__(
        self, model: Any, device_type: str, calls: Calls, cache: Any, watched: bool, why_not: str | None = None
    ) -> None:
        self.model, self.device_type, self.calls, self.cache, self.watched = model, device_type, calls, cache, watched
        self.kept: dict[Any, KeptStep] = {}  # by width, and what is asked for beside logits
        self.loaded: Step | None = None
        self.why_not: str | None = None
        self.nothing_captured: str | None = None
        if why_not is not None:
            self._refuse(why_not)

    def prepare(self, tokens: Tensor, **kwargs: Any) -> dict[str, Any]:
        if kwargs.get("is_first_iteration"):
            return dict(self.model.prepare_inputs_for_generation(tokens, **kwargs))
        return {CHECK: (tokens, kwargs)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if CHECK not in kwargs:
            return self.model(*args, **kwargs)
        tokens, of_step = kwargs.pop(CHECK)
        return self._check(tokens, of_step, kwargs)

    def update(self, outputs: Any, kwargs: dict[str, Any], **keywords: Any) -> dict[str, Any]:
        return dict(self.model._update_model_kwargs_for_generation(outputs, kwargs, **keywords))

    def generator(self, *args: Any, **kwargs: Any) -> Any:
        return _Shortened(self.model._get_candidate_generator(*args, **kwargs))

    def _check(self, tokens: Tensor, kwargs: dict[str, Any], asked: Mapping[str, Any]) -> Any:
        rows = kwargs["next_sequence_length"]
        width = width_for(rows)
        if self.cache.begin(width):
            self.kept.clear()
        key = (width, *sorted((name, str(value)) for name, value in asked.items()))
        kept = self._kept(key, tokens, kwargs)
        self.cache.rows = rows
        if kept is not None and kept.step.is_proven:
            return self._replayed(kept.step, tokens, kwargs, rows)
        self.loaded = None
        tokens, kwargs = inputs.padded(tokens, {**kwargs, "next_sequence_length": width}, width - rows)

        def run(tokens: Tensor, kwargs: Mapping[str, Any]) -> Any:
            self.cache.go_on(width)
            prepared = self.model.prepare_inputs_for_generation(tokens, **kwargs)
            if "logits_to_keep" in prepared:
                prepared["logits_to_keep"] = width
            return self.model(**{**prepared, **asked}, return_dict=True)

        outputs = run(tokens, kwargs) if kept is None else self._proved(kept, run, tokens, kwargs, width)
        return _first_rows(type(outputs), dict(outputs), rows)

    def _kept(self, key: tuple[Any, ...], tokens: Tensor, kwargs: dict[str, Any]) -> KeptStep | None:
        """The check that is captured, or is to be; anew where the model has changed."""
        if self.why_not is not None:
            return None
        found = self.kept.get(key)
        if found is not None and not self.watched and self.calls.active:
            return found
        observed = observe(self.model, self.device_type)
        reason = observed.why_not or why_not_now(self.device_type)
        if not self.calls.active or reason is not None:
            self._refuse(reason or "restored meanwhile")
            return None
        if found is None or found.observed.state != observed.state:
            whole = (inputs.shape_of(tokens, {**kwargs, "next_sequence_length": None}), mode(self.device_type), key)
            found = self.kept[key] = KEPT.of(self.model).step(whole, observed, self.cache)
        if found.why_not is not None:
            self._refuse(found.why_not)
            return None
        return found

    def _proved(self, kept: KeptStep, run: Run, tokens: Tensor, kwargs: dict[str, Any], width: int) -> Any:
        length = caches.length_of(self.cache)
        inputs_of = partial(StepInputs.of, length=length, width=width, taken=inputs.COUNTED)
        outputs, reason = kept.prove(run, tokens, kwargs, inputs_of, partial(observe, self.model, self.device_type))
        if reason is not None:
            self.nothing_captured = reason
            self._refuse(reason)
        return outputs

    def _replayed(self, step: Step, tokens: Tensor, kwargs: dict[str, Any], rows: int) -> Any:
        assert step.inputs is not None and step.graph is not None
        if self.loaded is not step:
            step.inputs.load(*inputs.padded(tokens, kwargs, step.inputs.width - rows))
            self.loaded = step
        else:
            step.inputs.take_rows(tokens, kwargs, rows)
        step.graph.replay()
        self.calls.ran += 1
        kind, values = step.graph.result
        found = _first_rows(kind, {**values, cache_name_of(kwargs): self.cache}, rows)
        found.logits = found.logits.clone()  # scores are kept, and the next replay writes there
        return found

    def _refuse(self, reason: str) -> None:
        self.why_not = reason
        self.calls.fell_through[reason] += 1


class ModelOfDrafts(ModelOfLoop):
    """With generators of drafts that fit."""

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        return self._session.generator(*args, **kwargs)


class _Shortened:
    """A generator of drafts, which gives no more of them than a check has rows for."""

    def __init__(self, made: Any) -> None:
        self._made = made

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._made)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_made"], name)

    def get_candidates(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        ids, logits = self._made.get_candidates(input_ids, *args, **kwargs)
        most = input_ids.shape[1] + WIDEST - 1
        return ids[:, :most], None if logits is None else logits[:, : WIDEST - 1]


def width_for(rows: int) -> int:
    return max(2, 1 << (rows - 1).bit_length())


def _first_rows(kind: type, values: dict[str, Any], rows: int) -> Any:
    logits = values["logits"][:, :rows]
    hidden = values.get("hidden_states")
    if hidden is not None:
        values["hidden_states"] = tuple(each if each is None else each[:, :rows] for each in hidden)
    return kind(**{**values, "logits": logits})
