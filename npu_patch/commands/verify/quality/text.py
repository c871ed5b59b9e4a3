"""Text to measure on, as tokens: what every Python brings along, or a file of one's own."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from npu_patch.commands.console.result import CommandError, named

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
LONGEST_TOKEN = 16  # characters of text for each token that is wanted: more than any language's average


@dataclass(frozen=True)
class Tokens:
    """`first`: what stands before every piece, such as the token for the beginning of a text."""

    described: str
    ids: tuple[int, ...]
    first: tuple[int, ...] = ()

    def pieces(self, length: int) -> Iterator[Tensor]:
        """`[1, length]` each, the last one shorter; a single token predicts nothing."""
        step = length - len(self.first)
        for start in range(0, len(self.ids), step):
            piece = [*self.first, *self.ids[start : start + step]]
            if len(piece) > 1:
                yield torch.tensor([piece])


def tokens_in(folder: Path, file: Path | None, vocabulary: int, count: int) -> Tokens:
    """The first `count` tokens, or as many as there are, by the tokenizer in `folder`; bytes, where it has none.

    Raises:
        CommandError: for a file or a tokenizer that cannot be read, and for tokens that the model does not know.
    """
    text, described = _text(file)
    text = text[: LONGEST_TOKEN * count]
    if not any((folder / name).is_file() for name in TOKENIZERS):
        ids = tuple(byte % vocabulary for byte in text.encode())
        return Tokens(f"{described}, as bytes modulo {vocabulary} (no tokenizer)", _enough(ids, described)[:count])
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        first = tuple(tokenizer("")["input_ids"][:1])
    except Exception as error:
        raise CommandError(f"MODEL {folder}: its tokenizer cannot be used: {named(error)}") from error
    ids = _enough(ids, described)[:count]
    if max(*ids, *first) >= vocabulary:
        raise CommandError(
            f"MODEL {folder}: its tokenizer gives the token {max(*ids, *first)}, the model knows {vocabulary}"
        )
    return Tokens(described, ids, first)


def _enough(ids: tuple[int, ...], described: str) -> tuple[int, ...]:
    if len(ids) < 2:
        raise CommandError(f"{described}: there are {len(ids)} tokens in it; accepted are texts from 2 tokens on")
    return ids


def _text(file: Path | None) -> tuple[str, str]:
    if file is not None:
        try:
            return file.read_text(encoding="utf-8"), f"--text {file}"
        except (OSError, ValueError) as error:
            raise CommandError(f"--text {file} cannot be read: {named(error)}; a file in UTF-8 is accepted") from error
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CommandError("this Python comes without pydoc_data.topics; name another text with --text FILE") from error
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return text, f"the language reference of Python {platform.python_version()} (pydoc_data.topics)"
