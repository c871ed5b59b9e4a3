"""Models that generate by continuous batching, and what `generate()` says of the same prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from npu_patch.patches.inference.continuous_batching import kept
from npu_patch.reporting.report import Report
from tests.support.tiny_models import tiny

Prompts = Sequence[list[int]]
PROMPTS: Prompts = ([1, 2, 3, 4, 5], [7, 8, 9], list(range(11, 51)), [9] * 17, [3, 4])  # a page has 16 tokens
NEW = 12
NEAR = 2e-3  # between two logits of about 1: what a rounding to float16 may turn round
OPTIONS: dict[str, Any] = {"page_size": 16, "num_blocks": 32, "max_batch_tokens": 64, "max_requests_per_batch": 4}


def half(name: str, dtype: torch.dtype = torch.float16, **overrides: Any) -> Any:
    """Its weights are those of the float32 model, rounded."""
    return tiny(name, **overrides).to(dtype).eval()


@torch.no_grad()
def generated(model: Any, prompts: Prompts = PROMPTS, new: int = NEW, eos: int | None = None) -> list[list[int]]:
    """By `generate()`, each prompt alone."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        made = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=0)
        found.append(made[0, len(prompt) :].tolist())
    return found


def config(**options: Any) -> Any:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    return ContinuousBatchingConfig(**{**OPTIONS, **options})


def generation(new: int = NEW, eos: int = -1, **options: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        **{"max_new_tokens": new, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0, **options}
    )


def batched(model: Any, prompts: Prompts = PROMPTS, new: int = NEW, eos: int = -1, **options: Any) -> list[list[int]]:
    """By `generate_batch`."""
    found = model.generate_batch(
        inputs=list(prompts), generation_config=generation(new, eos), continuous_batching_config=config(**options)
    )
    assert list(found) == [f"req_{index}" for index in range(len(prompts))]
    return [each.generated_tokens for each in found.values()]


@torch.no_grad()
def apart(found: Prompts, expected: Prompts, model: Any, near: float = NEAR, prompts: Prompts = PROMPTS) -> list[str]:
    """Where tokens differ that the model, given in float32, does not take for all but equally likely; beyond such a
    place, two ways are no more comparable."""
    problems = []
    for prompt, its, wanted in zip(prompts, found, expected, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(its, wanted, strict=False)) if a != b), None)
        if at is None:
            problems += [] if len(its) == len(wanted) else [f"{len(its)} tokens, not {len(wanted)}"]
            continue
        logits = model(torch.tensor([prompt + wanted[:at]])).logits[0, -1]
        gap = float(logits.max() - logits[[its[at], wanted[at]]].min())
        if gap > near * float(logits.abs().max()):
            problems.append(f"token {at} of {prompt[:3]}...: {its[at]}, not {wanted[at]}, {gap:.1g} below")
    return problems


def calls_of(report: Report, site: str) -> Any:
    (found,) = [each for each in report if each.patch == "generate_batch" and each.site.endswith(site)]
    return found.calls


def kept_calls(report: Report) -> kept.KeepingCalls:
    calls = calls_of(report, "continuous_batching_context_manager")
    assert isinstance(calls, kept.KeepingCalls)
    return calls


@contextmanager
def joining_later(model: Any, prompts: Prompts, **options: Any) -> Iterator[list[list[int]]]:
    """Each prompt is given once the first token of the one before is there."""
    found: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(
        generation_config=generation(), continuous_batching_config=config(**options)
    ) as manager:
        for index, prompt in enumerate(prompts):
            manager.add_request(prompt, request_id=str(index), streaming=True, eos_token_id=-1)
            while str(index) not in found:
                _take(manager, found)
        while any(len(tokens) < NEW for tokens in found.values()):
            _take(manager, found)
    yield [found[str(index)] for index in range(len(prompts))]


def _take(manager: Any, found: dict[str, list[int]]) -> None:
    result = manager.get_result(timeout=10)
    assert result is not None and result.error is None, "generation ended"
    found[result.request_id] = list(result.generated_tokens)
