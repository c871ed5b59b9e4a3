"""Tokens per second with drafts and without, in one run: a head of several tokens, and drafts that are right as often
as is asked for.

    python scripts/bench_mtp.py                                       a tiny Qwen3.5, simulated unless there is an NPU
    python scripts/bench_mtp.py --device cuda --size 2b --tokens 256  random weights of a size that is used
    python scripts/bench_mtp.py --device cuda --model DIR             a model with mtp.* beside it, on --text FILE

A head of random weights drafts nothing that is taken: its rows are what a head costs. "right p" drafts the model's own
tokens, each right with the chance p, for nothing: its rows are what checking costs, and what it gains. Greedy, batch 1.
Of a simulated NPU the launches count, its times mean nothing; times of a GPU say nothing of an NPU. Tokens are compared
with plain decoding's; in half precision near ties part them.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from npu_patch import simulator

if simulator.real_device() is None and "cuda" not in sys.argv:
    simulator.start()

import torch
import transformers
from torch import Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.generation.utils import GenerationMixin

import npu_patch
from npu_patch.checkpoints.beside import write_beside
from npu_patch.patches.inference.mtp.head import new_head, published_names

TURNS = 3
OF_ALL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 4096}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "2b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Run:
    """Of one way: tokens, seconds of the whole call, forwards of the model, launches where they are counted."""

    tokens: list[int]
    seconds: float
    forwards: int
    launches: int | None


class Bench:
    def __init__(self, model: Any, ids: Tensor, options: argparse.Namespace) -> None:
        self.model, self.ids, self.options = model, ids, options
        self.forwards = 0

    def run(self, **given: Any) -> Run:
        """The median of some calls, after one that is not timed."""
        length = self.options.tokens
        given = {"do_sample": False, "max_new_tokens": length, "min_new_tokens": length, **given}
        original = GenerationMixin._update_model_kwargs_for_generation

        def counting(*args: Any, **kwargs: Any) -> Any:  # no hook: nothing with hooks is captured
            self.forwards += 1
            return original(*args, **kwargs)

        GenerationMixin._update_model_kwargs_for_generation = counting
        try:
            return self._run(given)
        finally:
            GenerationMixin._update_model_kwargs_for_generation = original

    def _run(self, given: dict[str, Any]) -> Run:
        self.model.generate(self.ids, **given)
        seconds = []
        for _ in range(1 if self.ids.device.type == "npu" else TURNS):
            self.forwards, launches = 0, None
            npu_patch.devices.synchronize(self.ids.device)
            start = time.perf_counter()
            if simulator.is_active() and self.ids.device.type == "npu":
                with simulator.count() as counted:
                    found = self.model.generate(self.ids, **given)
                launches = counted.launches
            else:
                found = self.model.generate(self.ids, **given)
            npu_patch.devices.synchronize(self.ids.device)
            seconds.append(time.perf_counter() - start)
        return Run(found[0, self.ids.shape[1] :].tolist(), statistics.median(seconds), self.forwards, launches)


@contextmanager
def drafts(plain: Tensor, number: int, right: float) -> Iterator[None]:
    """Prompt lookup drafts the tokens of `plain`, each right with this chance, as long as those before it are."""
    chance, original = random.Random(0), PromptLookupCandidateGenerator.get_candidates

    def get_candidates(self: Any, input_ids: Tensor) -> tuple[Tensor, None]:
        found = plain[:, input_ids.shape[1] : input_ids.shape[1] + number].clone()
        for at in range(found.shape[1]):
            if chance.random() >= right:
                found[0, at] = (found[0, at] + 1) % self.vocab_size
        return torch.cat((input_ids, found), -1), None

    PromptLookupCandidateGenerator.get_candidates = get_candidates
    try:
        yield
    finally:
        PromptLookupCandidateGenerator.get_candidates = original


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = _options()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model, ids = _model(options, Path(folder))
        with npu_patch.applied(model, device=options.device, mtp=True):
            _table(Bench(model, ids, options), options)


def _model(options: argparse.Namespace, folder: Path) -> tuple[Any, Tensor]:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    if options.model:
        model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
        text = options.text.read_text("utf-8") if options.text else __doc__
        return model, torch.tensor([tokenizer(text)["input_ids"][: options.prompt]], device=device)
    config = transformers.Qwen3_5TextConfig(**SIZES[options.size], **OF_ALL)
    with device:
        made = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    made.save_pretrained(folder)
    write_beside(folder, published_names(new_head(made)), "mtp.safetensors")
    made.config.name_or_path = str(folder)
    ids = torch.randint(2, config.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(1))
    return made.eval(), ids.to(device)


def _table(bench: Bench, options: argparse.Namespace) -> None:
    what = options.model or f"{options.size}, random weights"
    print(f"{what}, {options.dtype}, {npu_patch.devices.described(options.device)}: {options.tokens} tokens")
    print(f"{'':34}  tokens/s  of plain  tokens/forward  launches/token  the same tokens")
    plain = bench.run()
    sequence = torch.cat((bench.ids, bench.ids.new_tensor([plain.tokens])), 1)
    _row("plain", plain, plain)
    ways: list[tuple[str, dict[str, Any]]] = [("", {})]
    if options.device != "cpu":
        ways.append((", captured", {"cache_implementation": "static"}))
        _row("plain, captured", bench.run(**ways[1][1]), plain)
    for number in options.drafts:
        for words, way in ways:
            _row(f"head, {number} drafts{words}", bench.run(use_mtp=True, num_assistant_tokens=number, **way), plain)
        for right in options.right:
            for words, way in ways:
                with drafts(sequence, number, right):
                    run = bench.run(prompt_lookup_num_tokens=number, **way)
                _row(f"right {right}, {number} drafts{words}", run, plain)


def _row(name: str, run: Run, plain: Run) -> None:
    number = len(run.tokens)
    same = next((at for at, pair in enumerate(zip(run.tokens, plain.tokens, strict=True)) if pair[0] != pair[1]), None)
    per_forward = f"{number / run.forwards:.2f}" if run.forwards > 1 else "-"
    launches = "-" if run.launches is None else f"{run.launches / number:.0f}"
    words = "all" if same is None else f"up to {same}"
    speed = f"{number / run.seconds:8.1f}  {plain.seconds / run.seconds:8.2f}"
    print(f"{name:34}  {speed}  {per_forward:>14}  {launches:>14}  {words}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="npu", choices=npu_patch.devices.TYPES)
    parser.add_argument("--model", help="a folder with mtp.* beside the model")
    parser.add_argument("--text", type=Path, help="what a --model goes on from")
    parser.add_argument("--size", default="tiny", choices=SIZES)
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--right", type=float, nargs="+", default=[0.6, 0.8, 1.0])
    return parser.parse_args()


if __name__ == "__main__":
    main()
