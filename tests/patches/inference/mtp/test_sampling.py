"""Sampling with drafts draws from the model's own distribution: chi-square of what is drawn, over a tiny vocabulary."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import generation

from npu_patch import applied
from tests.support.heads import loaded, saved

VOCABULARY, DRAWS = 5, 200
PROMPT = torch.tensor([[2, 3, 1, 4]])
DRAWN = {"do_sample": True, "top_k": 0, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = loaded(saved("qwen3_5", tmp_path_factory.mktemp("model"), vocab_size=VOCABULARY))
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # so that it is far from sure that the head says the same
    return model


def pairs(model: Any) -> Tensor:
    """The probability of each second and third token."""
    found = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.double)
    for first, second in itertools.product(range(VOCABULARY), repeat=2):
        ids = torch.cat((PROMPT, torch.tensor([[first, second]])), 1)
        with torch.no_grad():
            log = model(input_ids=ids).logits[0].double().log_softmax(-1)
        found[second] += (log[3, first] + log[4, second] + log[5]).exp()
    return found


def p_value(counts: Tensor, expected: Tensor) -> float:
    """By the normal that the cube root of chi-square is close to (Wilson and Hilferty)."""
    rare = expected < 5
    counts, expected = (torch.cat((each[~rare], each[rare].sum()[None])) for each in (counts, expected))
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = expected.numel() - 1
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def drawn(model: Any, **given: Any) -> Tensor:
    torch.manual_seed(11)
    counts: Counter[tuple[int, int]] = Counter()
    for _ in range(DRAWS):
        ids = model.generate(PROMPT, max_new_tokens=3, **DRAWN, **given)[0]
        counts[int(ids[5]), int(ids[6])] += 1
    return torch.tensor([[counts[i, j] for j in range(VOCABULARY)] for i in range(VOCABULARY)], dtype=torch.double)


@pytest.mark.parametrize("how", [{"use_mtp": True, "num_assistant_tokens": 2}, {"prompt_lookup_num_tokens": 2}])
def test_what_is_drawn_has_the_models_distribution(how: dict[str, Any], model: Any) -> None:
    expected = pairs(model) * DRAWS
    with applied(model, device="cpu", mtp=True):
        assert p_value(drawn(model, **how), expected) > 1e-3


def test_drafts_that_are_always_taken_do_not(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test above can fail: the head's own distribution is another."""
    utils = generation.utils

    def take(ids: Tensor, logits: Tensor, length: int, new: Tensor, **given: Any) -> tuple[Tensor, Any]:
        last = torch.multinomial(new[0, -1].softmax(-1), 1)[None]
        return torch.cat((ids[:, ids.shape[1] - length :], last), 1), torch.tensor(length)

    monkeypatch.setattr(utils, "_speculative_sampling", take)
    expected = pairs(model) * DRAWS
    with applied(model, device="cpu", mtp=True):
        assert p_value(drawn(model, use_mtp=True), expected) < 1e-6


def test_what_waits_for_its_turn_is_drawn_from_the_model_too(model: Any, tmp_path: Path) -> None:
    """An assistant's first draft, made beside the prompt and taken after it."""
    from tests.support.tiny_models import tiny

    assistant = tiny("qwen3", vocab_size=VOCABULARY, max_position_embeddings=512, seed=4)
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assistant.generation_config.num_assistant_tokens = 3
    expected = pairs(model) * DRAWS
    with applied(model, device="cpu", mtp=True):
        assert p_value(drawn(model, assistant_model=assistant), expected) > 1e-3
