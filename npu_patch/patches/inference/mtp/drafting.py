"""What transformers' loop of drafts and checks has to do differently for states: a prompt goes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npu_patch.patches.inference.mtp import rollback
from npu_patch.patches.inference.mtp.stateful import is_rolled_back
from npu_patch.serving.replacement import TakenOver

Serve = Callable[..., Any]


def serve_generator(original: Serve) -> Serve:
    """`_get_candidate_generator`."""

    def serve(model: Any, *args: Any, **kwargs: Any) -> Any:
        generator = original(model, *args, **kwargs)
        assistant = getattr(generator, "assistant_model", None)
        ours = is_rolled_back(model), assistant is not None and is_rolled_back(assistant)
        if ours[1]:
            _split_prompt(generator, kwargs["input_ids"].shape[1])
        if ours[0] and not generator.requires_model_outputs:  # those that do wait for a first forward anyway
            _PromptFirst(generator)
        return generator if any(ours) else TakenOver(generator)

    return serve


def _split_prompt(generator: Any, tokens: int) -> None:
    """An assistant is asked to read the last token that it knows once more, the prompt's last one too: it runs alone.

    Raises:
        ValueError: if there is no other.
    """
    if tokens < 2:
        raise ValueError("an assistant model with a recurrent state needs a prompt of two tokens or more, not of one")
    generator.generation_config.prefill_chunk_size = tokens - 1


class _PromptFirst:
    """A prompt runs over chunks, which leave no states within, so no draft runs beside it: the first one is held back,
    and taken where its first token turns out to be the model's."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        generator.get_candidates, generator.update_candidate_strategy = self.hold, self.no_outcome

    def hold(self, input_ids: Tensor) -> tuple[Tensor, None]:
        del self.generator.get_candidates
        self.ids, self.logits = self.generator.get_candidates(input_ids)
        self.generator.get_candidates = self.held
        return input_ids, None

    def no_outcome(self, *args: Any) -> None:
        del self.generator.update_candidate_strategy

    def held(self, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        del self.generator.get_candidates
        known = input_ids.shape[1]
        left = self.ids.shape[1] - known
        if left < 1 or not torch.equal(self.ids[:, :known].to(input_ids.device), input_ids):
            candidates: tuple[Tensor, Tensor | None] = self.generator.get_candidates(input_ids)
            return candidates
        return self.ids, None if self.logits is None else self.logits[:, -left:]


def serve_loop(original: Serve) -> Serve:
    """`_assisted_decoding`."""

    def serve(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_rolled_back(model):
            return TakenOver(original(model, *args, **kwargs))
        cache = kwargs.get("past_key_values")
        rollback.start(cache)
        try:
            return original(model, *args, **kwargs)
        finally:
            rollback.stop(cache)

    return serve
