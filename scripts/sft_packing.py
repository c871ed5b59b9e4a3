"""LoRA fine-tuning by trl's SFTTrainer with packed sequences, without and with npu_patch, and the two loss curves.

    python scripts/sft_packing.py [--steps N] [--output DIRECTORY]     # needs trl, datasets, peft, matplotlib

A small random Qwen3 in float32, attention flash_attention_2, several texts packed into each row (`packing=True`: their
boundaries reach the model as position ids). On the simulated NPU unless this machine has one.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).parents[1]))

from npu_patch import simulator

if simulator.real_device() is None:
    simulator.start()

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

import npu_patch

MODEL = {"vocab_size": 260, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "head_dim": 32}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token is a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<pad>", "<eos>"])}
    of_bytes = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    of_bytes.pre_tokenizer, of_bytes.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=of_bytes, pad_token="<pad>", eos_token="<eos>")


def texts() -> Dataset:
    from pydoc_data import topics

    parts = [part for text in topics.topics.values() for part in text.split("\n\n") if 20 <= len(part) <= 120]
    return Dataset.from_dict({"text": parts[:400]})


def losses(patched: bool, steps: int, attention: str = "flash_attention_2") -> tuple[list[float], npu_patch.Report]:
    """The loss of each step, and what was rebound for it."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**MODEL, attn_implementation=attention))
    with tempfile.TemporaryDirectory() as directory, npu_patch.applied(patch=patched) as report:
        settings = SFTConfig(
            output_dir=directory,
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            max_length=160,
            packing=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            seed=0,
        )
        trainer = SFTTrainer(
            model,
            settings,
            train_dataset=texts(),
            processing_class=tokenizer(),
            peft_config=LoraConfig(r=8, target_modules="all-linear", init_lora_weights=True),
        )
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], report


def picture(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4))
    for (name, values), width in zip(curves.items(), (5.0, 1.5), strict=True):
        axis.plot(range(1, len(values) + 1), values, label=name, linewidth=width)
    axis.set(xlabel="step", ylabel="loss", title="LoRA SFT with packing (trl), without and with npu_patch")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (default 30)")
    parser.add_argument("--output", type=Path, default=Path("out"), help="where sft_packing.png goes (default out)")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    curves = {"unpatched": losses(False, options.steps)[0]}
    curves["patched"], report = losses(True, options.steps)
    print("step  unpatched  patched    difference")
    for step, (before, after) in enumerate(zip(*curves.values(), strict=True), 1):
        print(f"{step:4d}  {before:9.6f}  {after:9.6f}  {after - before:+.1e}")
    ran = {outcome.patch for outcome in report.patched if outcome.calls.ran}
    print(f"ran: {', '.join(sorted(ran))}")
    options.output.mkdir(parents=True, exist_ok=True)
    picture(curves, options.output / "sft_packing.png")
    print(f"loss curves: {options.output / 'sft_packing.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
