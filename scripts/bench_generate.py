"""Tokens per second of generation: eager, compiled, continuous batching and npu_patch's captured decode, in one run.

    python scripts/bench_generate.py --device cuda                     # a Qwen3 of 1.7 billion random weights
    python scripts/bench_generate.py --device npu --batch 1 32         # the same on a real NPU
    python scripts/bench_generate.py --device cuda --ways eager captured --profile

The ways run one after the other in one process, on one model in bfloat16. A cell is the median tokens per second of a
whole `generate()`, with its prefill, after a warm-up of the same shapes; `decode` leaves the prefill out. Times on a
GPU say nothing of an NPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

import npu_patch

SIZES = {
    "1.7b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}
TURNS = 3
Tokens = list[list[int]]


@dataclass(frozen=True)
class Way:
    """`settings` of the generation; `patched`: whether `apply()` is in place."""

    what: str
    patched: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    batched: bool = False


STATIC = ("cache_implementation", "static")
WAYS = {
    "eager": Way("dynamic cache, no compilation"),
    "patched": Way("dynamic cache, npu_patch without captured decode", patched=True),
    "compiled": Way("static cache, torch.compile by transformers", settings=(STATIC, ("disable_compile", False))),
    "continuous": Way("generate_batch, as transformers has it", batched=True),
    "captured": Way("static cache, npu_patch", patched=True, settings=(STATIC,)),
}


def generate(model: Qwen3ForCausalLM, way: Way, prompts: torch.Tensor, tokens: int) -> Tokens:
    settings = {"disable_compile": True, **dict(way.settings)}
    config = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0, **settings)
    if way.batched:
        config.eos_token_id = -1
        requests = prompts.tolist()
        outputs = model.generate_batch(requests, generation_config=config, progress_bar=False)
        order = sorted(outputs, key=lambda name: int(name.rsplit("_", 1)[-1]))
        return [outputs[name].generated_tokens for name in order]
    return model.generate(prompts, generation_config=config)[:, prompts.shape[1] :].tolist()


def seconds(device: str, run: Callable[[], Tokens]) -> tuple[float, Tokens]:
    runtime = torch.get_device_module(device)
    runtime.synchronize()
    started = time.perf_counter()
    result = run()
    runtime.synchronize()
    return time.perf_counter() - started, result


def in_place(way: Way, model: Qwen3ForCausalLM, device: str) -> AbstractContextManager[Any]:
    return npu_patch.applied(model, device=device) if way.patched else nullcontext()


def measure(model: Qwen3ForCausalLM, names: list[str], batch: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(1)
    prompts = torch.randint(1, model.config.vocab_size, (batch, options.prompt), device=options.device)
    found: dict[str, dict[str, Any]] = {}
    first: Tokens | None = None
    for name in names:
        way = WAYS[name]
        try:
            with in_place(way, model, options.device):
                started = time.perf_counter()
                generate(model, way, prompts, options.tokens)
                warm_up = time.perf_counter() - started
                generate(model, way, prompts, 1)
                whole, prefill = [], []
                for _ in range(TURNS):
                    prefill.append(seconds(options.device, partial(generate, model, way, prompts, 1))[0])
                    took, made = seconds(options.device, partial(generate, model, way, prompts, options.tokens))
                    whole.append(took)
                if options.profile:
                    profile(model, way, prompts, options)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            continue
        first = first or made
        took, begun = statistics.median(whole), statistics.median(prefill)
        found[name] = {
            "tokens_per_second": batch * options.tokens / took,
            "decode": batch * (options.tokens - 1) / (took - begun),
            "milliseconds_a_step": (took - begun) / (options.tokens - 1) * 1e3,
            "first_call_seconds": warm_up,
            "same_tokens": sum(a == b for x, y in zip(first, made, strict=True) for a, b in zip(x, y, strict=True))
            / (batch * options.tokens),
        }
    return found


def profile(model: Qwen3ForCausalLM, way: Way, prompts: torch.Tensor, options: argparse.Namespace) -> None:
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as taken:
        generate(model, way, prompts, 17)
        torch.get_device_module(options.device).synchronize()
    print(way.what)
    print(taken.key_averages().table(sort_by="self_device_time_total", row_limit=18, max_name_column_width=70))


def table(batch: int, found: dict[str, Any]) -> str:
    base = found.get("eager", {}).get("tokens_per_second")
    rows = [
        f"batch {batch:<6}{'tokens/s':>10}{'of eager':>10}{'decode':>10}{'ms/step':>9}{'first call':>12}{'same':>8}"
    ]
    for name, cell in found.items():
        if "error" in cell:
            rows.append(f"{name:<12}{cell['error']}")
            continue
        ratio = f"{cell['tokens_per_second'] / base:.2f}" if base else "-"
        rows.append(
            f"{name:<12}{cell['tokens_per_second']:>10.1f}{ratio:>10}{cell['decode']:>10.1f}"
            f"{cell['milliseconds_a_step']:>9.2f}{cell['first_call_seconds']:>10.1f} s{cell['same_tokens']:>8.1%}"
        )
    return "\n".join(rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or npu (default cuda)")
    parser.add_argument("--size", choices=SIZES, default="1.7b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=256, help="new tokens")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--profile", action="store_true", help="print where the device's time goes, of 17 tokens")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    with torch.device(options.device):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES[options.size])).eval()
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    results: dict[int, dict[str, Any]] = {}
    for batch in options.batch:
        results[batch] = measure(model, options.ways, batch, options)
        print(table(batch, results[batch]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=2))
    for name, way in WAYS.items():
        print(f"{name:<12}{way.what}")
    return 1 if any("error" in cell for each in results.values() for cell in each.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
