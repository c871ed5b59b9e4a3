"""transformers' Trainer and trl's SFTTrainer as they come, checkpointing on: patched they train, and learn the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, default_data_collator

import npu_patch
from tests.support.tiny_models import tiny
from tests.support.what_ran import why_not_ran

datasets = pytest.importorskip("datasets")

COMMON: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3}
COMMON |= {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "gradient_checkpointing": True}
ALLOWED = {False: 1e-5, True: 2e-2}  # of a loss near 5, in float32 and under bfloat16's autocast


def rows() -> Any:
    ids = [[(7 * row + column) % 97 + 2 for column in range(24)] for row in range(8)]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def by_trainer(model: torch.nn.Module, folder: Path, bf16: bool, reentrant: bool) -> list[float]:
    settings = TrainingArguments(
        str(folder), bf16=bf16, gradient_checkpointing_kwargs={"use_reentrant": reentrant}, **COMMON
    )
    return _losses(Trainer(model, settings, train_dataset=rows(), data_collator=default_data_collator))


def by_sft_trainer(model: torch.nn.Module, folder: Path, bf16: bool, reentrant: bool) -> list[float]:
    trl = pytest.importorskip("trl")
    from peft import LoraConfig
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(101)}, unk_token="w0"))
    settings = trl.SFTConfig(
        str(folder), bf16=bf16, gradient_checkpointing_kwargs={"use_reentrant": reentrant}, max_length=24, **COMMON
    )
    return _losses(
        trl.SFTTrainer(
            model,
            settings,
            train_dataset=rows(),
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1"),
        )
    )


def _losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("order", ["apply first", "apply to the model"])
@pytest.mark.parametrize("train", [by_trainer, by_sft_trainer])
def test_checkpointed_training_learns_the_same(
    train: Callable[..., list[float]], order: str, reentrant: bool, bf16: bool, tmp_path: Path
) -> None:
    family = "qwen3_moe" if train is by_trainer else "qwen3_5"
    original = train(tiny(family).train(), tmp_path, bf16, reentrant)
    if order == "apply first":
        npu_patch.apply()
    model = tiny(family)
    if order != "apply first":
        npu_patch.apply(model)
    patched = train(model, tmp_path, bf16, reentrant)
    report = npu_patch.report()
    assert len(patched) == 2 and patched == pytest.approx(original, rel=ALLOWED[bf16])
    for patch in ("rms_norm", "rope", "swiglu" if family == "qwen3_5" else "experts"):
        assert why_not_ran(patch, report) is None
