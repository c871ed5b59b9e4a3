"""The text, as sequences of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .settings import Settings, Unacceptable

VOCABULARY_OF_BYTES = 256
Tokenize = Callable[[str], list[int]]


def bytes_of(text: str) -> list[int]:
    """A token is a byte of the text in UTF-8."""
    return list(text.encode("utf-8"))


def sequences(settings: Settings, tokenize: Tokenize, vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """The text cut into sequences of equal length, a remainder left out. Errors: `Unacceptable`."""
    tokens = torch.tensor(tokenize(_text(settings)), dtype=torch.long)
    length, needed = settings.sequence_length, settings.sequence_length * settings.batch_size
    if len(tokens) < needed:
        raise Unacceptable(
            "--text",
            settings.text or "help topics of Python",
            f"{len(tokens)} tokens are too few: --batch-size {settings.batch_size} times --sequence-length {length} "
            f"needs at least {needed}",
        )
    if int(tokens.max()) >= vocabulary:
        raise Unacceptable(
            "--model",
            settings.model,
            f"its tokenizer gives token {int(tokens.max())}, its vocabulary ends at {vocabulary - 1}: "
            "accepted is a model with the tokenizer that belongs to it",
        )
    return [_example(sequence) for sequence in tokens[: len(tokens) // length * length].view(-1, length)]


def _example(sequence: torch.Tensor) -> dict[str, Any]:
    return {"input_ids": sequence, "labels": sequence}


def _text(settings: Settings) -> str:
    if settings.text is not None:
        return settings.text.read_text("utf-8")
    from pydoc_data import topics

    return "\n\n".join(text for _, text in sorted(topics.topics.items()))
