"""Somebody's training script, which knows nothing of npu_patch: a Trainer, whose losses go to a file.

python tests/support/trainer_job.py FILE
"""

import json
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments, set_seed

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def main(file: Path) -> None:
    set_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS))
    tokens = torch.randint(0, 64, (16, 12))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        str(file.parent / "out"), max_steps=3, per_device_train_batch_size=2, logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        file.write_text(json.dumps({"losses": losses, "ranks": trainer.args.world_size}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
