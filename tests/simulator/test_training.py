"""transformers.Trainer on the simulated NPU."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.support.tiny_models import tiny, tiny_batch

pytestmark = pytest.mark.usefixtures("simulated")


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_trainer_in_bfloat16_with_gradient_checkpointing(family: str, npu: torch.device, tmp_path: Path) -> None:
    model = tiny(family, use_cache=False, attention_dropout=0.1)
    batch = tiny_batch()
    rows = [{key: value[i % 2] for key, value in batch.items()} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        bf16=True,
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    assert arguments.device == npu
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert all(torch.tensor(losses).isfinite())
    assert losses[-1] < losses[0] - 0.3
    assert next(model.parameters()).device == npu
