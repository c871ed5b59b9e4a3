"""What the user asked for: the arguments, read and checked without importing torch."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RUNS = ("unpatched", "patched")
DEVICES = ("auto", "npu", "simulated")


class Unacceptable(ValueError):
    """An argument that cannot be worked with. The message names it, its value and what is accepted."""

    def __init__(self, argument: str, value: object, reason: str) -> None:
        super().__init__(f"argument {argument}: {str(value)!r}: {reason}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison: the model, the text, the LoRA job, and which of its two runs to do."""

    model: Path | None = None  # None: small random models
    text: Path | None = None  # None: the help topics of Python
    sequence_length: int | None = None  # None: of pictures, as long as each example is
    steps: int
    batch_size: int
    learning_rate: float
    lora_rank: int
    dtype: str
    gradient_checkpointing: bool
    seed: int
    runs: tuple[str, ...]
    device: str
    output: Path


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune with LoRA on an Ascend NPU (a simulated one where there is none), the same job without "
        "and with npu_patch.apply(), and show what that changed. Without --model: a small Qwen3.5 and a small "
        "Qwen3-MoE with random weights, on the help topics of Python, byte by byte.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=_model_directory, metavar="DIR", help="a causal LM and its tokenizer, as saved by transformers")
    add("--text", type=_text_file, metavar="FILE", help="a UTF-8 text file to train on")
    add("--sequence-length", type=_whole(2), default=128, help="tokens per sequence")
    _add_the_job(parser, "out/lora_finetune")
    return parser


def vision_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune a small Qwen2.5-VL with LoRA on an Ascend NPU (a simulated one where there is none), "
        "the same job without and with npu_patch.apply(), and show what that changed. It learns to name the shape and "
        "the colour in drawn images of several sizes, which go through the family's own processor.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_the_job(parser, "out/vlm_finetune")
    return parser


def _add_the_job(parser: argparse.ArgumentParser, output: str) -> None:
    add = parser.add_argument
    add("--steps", type=_whole(1), default=30, help="optimizer steps of each run")
    add("--batch-size", type=_whole(1), default=4, help="sequences per step")
    add("--learning-rate", type=_positive, default=3e-3, help="at the first step; it falls linearly to 0")
    add("--lora-rank", type=_whole(1), default=8, help="of the adapters on all linear layers")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights and the computation")
    add("--gradient-checkpointing", action="store_true", help="recompute each layer in the backward pass")
    add("--seed", type=_whole(0), default=0, help="of the weights, the adapters and the order of the data")
    add("--only", choices=RUNS, help="do one of the two runs")
    add("--device", choices=DEVICES, default="auto", help="auto: the NPU if there is one, else a simulated one")
    add("--output", type=_output_directory, default=output, metavar="DIR", help="curves and adapters")


def settings_of(arguments: argparse.Namespace) -> Settings:
    values = vars(arguments)
    only = values.pop("only")
    return Settings(**values, runs=RUNS if only is None else (only,))


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r}: accepted is a whole number, at least {least}")
        return number

    return whole


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 < number < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r}: accepted is a number above 0, such as 1e-4")
    return number


def _model_directory(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no directory: accepted is one written by save_pretrained()")
    try:
        json.loads((path / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} has no readable config.json ({error}): accepted is a directory written by save_pretrained()"
        ) from None
    return path


def _text_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no file: accepted is a text file in UTF-8")
    try:
        content = path.read_text("utf-8")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}): "
            "accepted is a text file in UTF-8"
        ) from None
    if not content.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is empty: accepted is a text file in UTF-8")
    return path


def _output_directory(text: str) -> Path:
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be made ({error.strerror}): accepted is a directory, existing or new"
        ) from None
    return path
