"""Drafts of all kinds in the place of prompt lookup's: of the tokens that are still to come, what is drafted."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

VOCABULARY = 101
Draft = Callable[[list[int], random.Random], list[int]]


def wrong(token: int) -> int:
    return (token + 1) % VOCABULARY


DRAFTS: dict[str, Draft] = {
    "always wrong": lambda rest, chance: [wrong(each) for each in rest[:4]],
    "right then wrong": lambda rest, chance: [*rest[:2], *map(wrong, rest[2:5])],
    "all right": lambda rest, chance: rest[:5],
    "longer than the rest": lambda rest, chance: [*rest, *range(2, 40)] if len(rest) < 20 else rest[:60],
    "by chance": lambda rest, chance: [
        each if chance.random() < 0.7 else wrong(each) for each in rest[: chance.randrange(9)]
    ],
}


def drafting(monkeypatch: pytest.MonkeyPatch, plain: Tensor, of: Draft) -> list[int]:
    """Has prompt lookup draft what it is told to, of a model that says `plain`. The lengths of the drafts are noted."""
    lengths: list[int] = []
    chance = random.Random(3)

    def get_candidates(self: Any, input_ids: Tensor) -> tuple[Tensor, None]:
        assert torch.equal(input_ids.cpu(), plain[:, : input_ids.shape[1]])
        found = of(plain[0, input_ids.shape[1] :].tolist(), chance)
        lengths.append(len(found))
        return torch.cat(
            (input_ids, torch.tensor(found, dtype=input_ids.dtype).view(1, -1).to(input_ids.device)), -1
        ), None

    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", get_candidates)
    return lengths
