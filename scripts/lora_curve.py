"""Trains adapters on the simulated NPU, unpatched and patched, and holds the difference against that of a second seed.

    python scripts/lora_curve.py                         # qwen3 and qwen3_moe, 200 steps each
    python scripts/lora_curve.py --families llama --steps 100

A small frozen model in bfloat16 with float32 adapters on its linear layers, autocast to bfloat16 and dropout 0.05,
learns a chain in which each word is followed by one of four (at best, a loss of 1.386). A seed decides the adapters,
the order of the data and what is dropped. The losses of every 20 steps are averaged; patched and unpatched, from one
seed, may differ by no more than two seeds do, on average and at most. Ends with 1 where they do.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

from npu_patch import simulator

if not simulator.is_active():
    simulator.start()

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

import npu_patch

VOCABULARY, FOLLOWERS, BATCH, LENGTH, WINDOW = 64, 4, 8, 32, 20
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,  # frozen weights from which adapters can make something
}
RUNS = {"unpatched, seed 0": (0, False), "unpatched, seed 1": (1, False), "patched, seed 0": (0, True)}


def main() -> int:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["qwen3", "qwen3_moe"], metavar="TYPE")
    parser.add_argument("--steps", type=int, default=200, help=f"at least {WINDOW}")
    options = parser.parse_args()
    if options.steps < WINDOW:
        parser.error(f"--steps {options.steps}: at least {WINDOW} are accepted")
    within = [compared(family, options.steps) for family in options.families]
    return 0 if all(within) else 1


def compared(family: str, steps: int) -> bool:
    start, curves = time.perf_counter(), {}
    for name, (seed, patched) in RUNS.items():
        curves[name] = smoothed(losses(family, steps, seed, patched))
    print(f"{family}, {steps} steps, {time.perf_counter() - start:.0f} s: mean loss of every {WINDOW} steps\n")
    print(f"| steps | {' | '.join(RUNS)} | patched to unpatched | seed 1 to seed 0 |")
    print("| --- " * (len(RUNS) + 3) + "|")
    first, second, ours = curves.values()
    patching, noise = apart(ours, first), apart(second, first)
    for at, row in enumerate(zip(*curves.values(), patching, noise, strict=True)):
        print(f"| {at * WINDOW + 1} to {(at + 1) * WINDOW} | {' | '.join(f'{each:.4f}' for each in row)} |")
    within = max(patching) <= max(noise) and sum(patching) <= sum(noise)
    print(
        f"\npatched to unpatched {mean(patching):.4f} on average, {max(patching):.4f} at most; seed 1 to seed 0 "
        f"{mean(noise):.4f} and {max(noise):.4f}: {'within' if within else 'NOT WITHIN'} the noise\n",
        flush=True,
    )
    return within


def losses(family: str, steps: int, seed: int, patched: bool) -> list[float]:
    """Of each step."""
    model = adapted_model(family, seed)
    if patched:
        report = npu_patch.apply(model)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-3)
    order, found = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        ids = batch_of(order).to("npu")
        with torch.autocast("npu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.append(loss.detach())
    if patched:
        of_both = {each.patch for each in report.patched if each.calls.ran and each.patch in ("lora", "cross_entropy")}
        if len(of_both) < 2:
            raise SystemExit(f"{family}: not patched as it should be\n{report}")
        npu_patch.restore()
    return torch.stack(found).tolist()


def adapted_model(family: str, seed: int) -> torch.nn.Module:
    """One model for all seeds, with adapters of this one."""
    torch.manual_seed(123)
    config = transformers.AutoConfig.for_model(family, **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    linear = [name for name, each in model.named_modules() if type(each) is torch.nn.Linear]
    targets = sorted({name.rsplit(".", 1)[-1] for name in linear} - {"lm_head"})
    torch.manual_seed(seed)
    adapters = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=targets)
    model = get_peft_model(model, adapters).train().to("npu")
    torch.manual_seed(seed)  # of the device too
    return model


def batch_of(order: torch.Generator) -> Tensor:
    """Sentences of the chain, `[BATCH, LENGTH]`."""
    followers = torch.randint(VOCABULARY, (VOCABULARY, FOLLOWERS), generator=torch.Generator().manual_seed(7))
    words = [torch.randint(VOCABULARY, (BATCH,), generator=order)]
    for _ in range(LENGTH - 1):
        choice = torch.randint(FOLLOWERS, (BATCH,), generator=order)
        words.append(followers[words[-1], choice])
    return torch.stack(words, 1)


def smoothed(values: Sequence[float]) -> list[float]:
    return [mean(values[at : at + WINDOW]) for at in range(0, len(values) - WINDOW + 1, WINDOW)]


def apart(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(one, other, strict=True)]


def mean(values: Sequence[Any]) -> float:
    return float(sum(values) / len(values))


if __name__ == "__main__":
    sys.exit(main())
