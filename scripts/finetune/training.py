"""One run of the job: build, wrap with LoRA, train with `transformers.Trainer`."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import npu_patch

from .device import Device
from .meter import Cost, Meter
from .models import Candidate, with_lora
from .settings import Settings


@dataclass(frozen=True)
class Run:
    """What came of it."""

    losses: list[float]
    cost: Cost
    report: npu_patch.Report | None  # None: unpatched


def train(
    candidate: Candidate, run: str, data: list[dict[str, Any]], settings: Settings, device: Device, bar: tqdm
) -> Run:
    """`run` is "unpatched" or "patched"; everything else is the same in both, seeds and order of the data included."""
    bar.set_description_str(f"{candidate.name}, {run}")
    model = with_lora(candidate, settings)
    meter, losses = Meter(device), Losses(bar)
    folder = settings.output / candidate.name / run
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            bf16=settings.dtype == "bfloat16",
            gradient_checkpointing=settings.gradient_checkpointing,
            seed=settings.seed,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        ),
        train_dataset=data,
        data_collator=candidate.collate,
        callbacks=[meter, losses],
    )
    trainer.remove_callback(PrinterCallback)
    with npu_patch.applied(model) if run == "patched" else nullcontext() as report:
        trainer.train()
    model.save_pretrained(folder)
    del trainer, model
    gc.collect()
    torch.npu.empty_cache()
    return Run(losses.values, meter.cost(), report)


class Losses(TrainerCallback):
    """The loss of every step, and the progress bar."""

    def __init__(self, bar: tqdm) -> None:
        self.values: list[float] = []
        self._bar = bar

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.values.append(logs["loss"])
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)
            self._bar.update()
