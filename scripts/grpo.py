"""GRPO with LoRA by trl's GRPOTrainer, without and with npu_patch: rewards, gradients, and what generation costs.

    python scripts/grpo.py [--rollout static|dynamic|continuous] [--steps N]     # needs trl, datasets, peft

A small random Qwen3 in float32 learns to write small letters: the reward is their share in a completion. Both runs draw
from the same seed, so their rewards and gradients should be the same. On the simulated NPU unless this machine has one;
tokens per second are then those of a simulation, and say nothing of an NPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).parents[1]))

from npu_patch import simulator

if simulator.real_device() is None:
    simulator.start()

import torch
from datasets import Dataset
from peft import LoraConfig
from sft_packing import tokenizer
from transformers import PrinterCallback, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import npu_patch

SIMULATED = simulator.real_device() is None
MODEL = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "max_position_embeddings": 512}
MODEL |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 256,
    "eos_token_id": 257,
}
PROMPTS = ("Write small letters.", "Go on:", "Small letters, please, and nothing else.", "abc")
GROUP = 8  # completions of a prompt
ROLLOUTS: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static"},
    "dynamic": {},
    "continuous": {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"num_blocks": 32, "page_size": 128, "max_batch_tokens": 256},
    },
}


@dataclass
class Run(TrainerCallback):
    """What one training showed, step by step."""

    tokens: int
    rewards: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    launches: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.kept.append(torch.npu.memory_allocated())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "reward" in logs:
            self.rewards.append(logs["reward"])
            self.gradient_norms.append(logs["grad_norm"])

    @contextmanager
    def rollout(self) -> Iterator[None]:
        started = time.perf_counter()
        with simulator.count() if SIMULATED else nullcontext() as counted:
            yield
        self.seconds.append(time.perf_counter() - started)
        self.launches.append(counted.launches if counted else 0)

    @property
    def launches_of_a_token(self) -> float:
        """Of all the samples of a batch at once. The first rollout captures, so it is left out."""
        return sum(self.launches[1:]) / len(self.launches[1:]) / self.tokens


def small_letters(completion_ids: list[list[int]], **_: Any) -> list[float]:
    letters = set(tokenizer().convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyz")))
    return [sum(token in letters for token in tokens) / max(1, len(tokens)) for tokens in completion_ids]


def train(patched: bool, options: argparse.Namespace) -> tuple[Run, npu_patch.Report]:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**MODEL, num_hidden_layers=options.layers))
    run = Run(options.tokens)
    with tempfile.TemporaryDirectory() as directory, npu_patch.applied(patch=patched) as report:
        settings = GRPOConfig(
            output_dir=directory,
            max_steps=options.steps,
            per_device_train_batch_size=GROUP * len(PROMPTS),
            num_generations=GROUP,
            max_completion_length=options.tokens,
            learning_rate=2e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            bf16=False,
            disable_tqdm=True,
            seed=0,
            **ROLLOUTS[options.rollout],
        )
        trainer = GRPOTrainer(
            model,
            small_letters,
            settings,
            train_dataset=Dataset.from_dict({"prompt": list(PROMPTS) * options.steps}),
            processing_class=tokenizer(),
            peft_config=LoraConfig(r=8, target_modules="all-linear"),
            callbacks=[run],
        )
        trainer.remove_callback(PrinterCallback)
        generate = trainer._generate_single_turn

        def counted(*arguments: Any, **named: Any) -> Any:
            with run.rollout():
                return generate(*arguments, **named)

        trainer._generate_single_turn = counted
        trainer.train()
    return run, report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollout", choices=ROLLOUTS, default="static", help="how completions are generated")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps (default 12)")
    parser.add_argument("--tokens", type=int, default=24, help="of a completion, at most (default 24)")
    parser.add_argument("--layers", type=int, default=2, help="of the model (default 2)")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    (before, _), (after, report) = train(False, options), train(True, options)
    print("step  reward: unpatched  patched    gradient norm: unpatched  patched")
    for step in range(options.steps):
        print(
            f"{step + 1:4d}          {before.rewards[step]:9.6f}  {after.rewards[step]:9.6f}"
            f"                 {before.gradient_norms[step]:9.6f}  {after.gradient_norms[step]:9.6f}"
        )
    for name, run in (("unpatched", before), ("patched", after)):
        rate = GROUP * len(PROMPTS) * options.tokens * (len(run.seconds) - 1) / sum(run.seconds[1:])
        print(
            f"{name}: {run.launches_of_a_token:.1f} launches a token of the batch, {rate:.0f} tokens/s"
            f"{' (simulated)' if SIMULATED else ''}, {max(run.kept) / 2**20:.1f} MiB allocated between steps"
        )
    print(f"launches: {after.launches_of_a_token / before.launches_of_a_token:.3f} of unpatched")
    print(f"ran: {', '.join(sorted({outcome.patch for outcome in report.patched if outcome.calls.ran}))}")
    same = before.rewards == after.rewards
    apart = max(abs(a / b - 1) for a, b in zip(after.gradient_norms, before.gradient_norms, strict=True))
    print(f"rewards {'are the same' if same else 'DIFFER'}; gradient norms within {apart:.1e} of each other")
    improved = sum(after.rewards[-3:]) > sum(after.rewards[:3])
    print(f"the reward {'improved' if improved else 'DID NOT IMPROVE'}")
    return 0 if same and improved and apart < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
