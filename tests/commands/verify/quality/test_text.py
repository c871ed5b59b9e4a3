"""The text that models are measured on, as tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from npu_patch.commands.console.result import CommandError
from npu_patch.commands.verify.quality.text import Tokens, tokens_in


def with_tokenizer(folder: Path, begin: bool) -> Path:
    """Of the words a, b and c, which are 1, 2 and 3; all others are 0. `begin`: 4 stands before each text."""
    made = Tokenizer(models.WordLevel({"?": 0, "a": 1, "b": 2, "c": 3, "<s>": 4}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if begin:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?").save_pretrained(folder)
    return folder


def written(folder: Path, text: str) -> Path:
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder / "text.txt"


@pytest.mark.parametrize("begin", [False, True])
def test_the_models_tokenizer_counts_and_what_it_begins_with_begins_each_piece(begin: bool, tmp_path: Path) -> None:
    tokens = tokens_in(with_tokenizer(tmp_path, begin), written(tmp_path, "a b c c b d a"), 5, 6)
    assert tokens.ids == (1, 2, 3, 3, 2, 0)
    pieces = [piece.tolist() for piece in tokens.pieces(4)]
    assert pieces == ([[[4, 1, 2, 3]], [[4, 3, 2, 0]]] if begin else [[[1, 2, 3, 3]], [[2, 0]]])


def test_without_a_tokenizer_bytes_are_tokens_and_it_is_said(tmp_path: Path) -> None:
    tokens = tokens_in(tmp_path, written(tmp_path, "aé"), 50, 10)
    assert tokens.ids == tuple(byte % 50 for byte in "aé".encode())
    assert "as bytes modulo 50 (no tokenizer)" in tokens.described


def test_every_python_has_enough_text_and_it_is_the_same_each_time(tmp_path: Path) -> None:
    one, other = (tokens_in(tmp_path, None, 256, 100_000) for _ in range(2))
    assert one == other and len(one.ids) == 100_000
    text = bytes(one.ids).decode()
    assert text.count(" the ") > 500 and "language reference of Python 3." in one.described


def test_a_last_token_alone_is_no_piece() -> None:
    assert [piece.shape for piece in Tokens("", tuple(range(9))).pieces(4)] == [torch.Size((1, 4))] * 2


@pytest.mark.parametrize(
    ("text", "vocabulary", "said"),
    [("a", 5, "there are 1 tokens in it"), ("", 5, "there are 0 tokens"), ("a b c", 3, "gives the token 3, the model")],
)
def test_text_that_cannot_be_used_is_named(text: str, vocabulary: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=said):
        tokens_in(with_tokenizer(tmp_path, False), written(tmp_path, text), vocabulary, 10)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CommandError, match=r"--text .*file cannot be read"):
        tokens_in(tmp_path, tmp_path / "file", 5, 10)
