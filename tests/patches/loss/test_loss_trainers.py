"""Jobs of transformers' Trainer and of trl: patched they learn the same, and the logits are made for whoever asks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, default_data_collator

import npu_patch
from npu_patch.ops import chunked_loss
from tests.patches.loss.test_loss import calls_of, model_of
from tests.support.gradients import relative_error
from tests.support.largest_tensor import Largest
from tests.support.tiny_models import COMMON, tiny_batch

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

ONLY_THE_LOSS = {"fused_ops": False, "moe_patch": False, "fla": False}
VOCABULARY = COMMON["vocab_size"]
SETTINGS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
}
ADAPTERS = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
SENTENCE = "w5 w7 w9 w2 w11 w13"


@pytest.fixture(autouse=True)
def nothing_left_applied(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(chunked_loss, "ELEMENTS", 16 * VOCABULARY)
    yield
    npu_patch.restore()


def rows() -> Any:
    ids = [[(7 * row + column) % 97 + 2 for column in range(24)] for row in range(8)]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", bos_token="w1")


def logs_of(trainer: Trainer) -> list[dict[str, float]]:
    """Of the training and the evaluation, without times."""
    trainer.train()
    dropped = ("time", "runtime", "per_second", "flos", "epoch", "step")
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in dropped)}
        for entry in trainer.state.log_history
    ]


def by_trainer(model: torch.nn.Module, folder: Path, **settings: Any) -> list[dict[str, float]]:
    arguments = TrainingArguments(str(folder), **SETTINGS, **settings)
    return logs_of(Trainer(model, arguments, train_dataset=rows(), data_collator=default_data_collator))


def accuracy(found: Any) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1)[:, :-1] == found.label_ids[:, 1:]).mean())}


def by_evaluating_trainer(model: torch.nn.Module, folder: Path, **settings: Any) -> list[dict[str, float]]:
    arguments = TrainingArguments(str(folder), eval_strategy="steps", eval_steps=2, **SETTINGS, **settings)
    return logs_of(
        Trainer(
            model,
            arguments,
            train_dataset=rows(),
            eval_dataset=rows().select(range(2)),
            data_collator=default_data_collator,
            compute_metrics=accuracy,
        )
    )


def by_sft(model: torch.nn.Module, folder: Path, **settings: Any) -> list[dict[str, float]]:
    arguments = trl.SFTConfig(str(folder), max_length=24, **SETTINGS, **settings)
    return logs_of(
        trl.SFTTrainer(
            model,
            arguments,
            train_dataset=rows(),
            peft_config=ADAPTERS,
            processing_class=tokenizer(),
        )
    )


def pairs() -> Any:
    rejected = " ".join(reversed(SENTENCE.split()))
    return datasets.Dataset.from_dict(
        {
            "prompt": [f"w{3 + row} w4" for row in range(4)],
            "chosen": [SENTENCE] * 4,
            "rejected": [f"w{20 + row} {rejected}" for row in range(4)],
        }
    )


def by_dpo(model: torch.nn.Module, folder: Path, **settings: Any) -> list[dict[str, float]]:
    arguments = trl.DPOConfig(str(folder), max_length=24, **SETTINGS, **settings)
    return logs_of(
        trl.DPOTrainer(model, args=arguments, train_dataset=pairs(), peft_config=ADAPTERS, processing_class=tokenizer())
    )


def by_cpo(model: torch.nn.Module, folder: Path, **settings: Any) -> list[dict[str, float]]:
    """Of those that take log-probabilities from logits; and their mean, and a loss of its own."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    arguments = CPOConfig(str(folder), max_length=24, **SETTINGS, **settings)
    return logs_of(CPOTrainer(model, args=arguments, train_dataset=pairs(), processing_class=tokenizer()))


def by_grpo(model: torch.nn.Module, folder: Path, **settings: Any) -> list[dict[str, float]]:
    arguments = trl.GRPOConfig(
        str(folder), num_generations=2, max_completion_length=4, beta=0.1, **SETTINGS, **settings
    )
    return logs_of(
        trl.GRPOTrainer(
            model,
            reward_funcs=lambda completions, **others: [float(len(set(each))) for each in completions],
            args=arguments,
            train_dataset=pairs().select_columns("prompt"),
            peft_config=ADAPTERS,
            processing_class=tokenizer(),
        )
    )


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize(
    ("train", "served"),
    [
        (by_trainer, {"forward": 2, "loss": 2}),
        (by_evaluating_trainer, {"forward": 2, "loss": 3}),
        (by_sft, {}),
        (by_dpo, {}),
        (by_grpo, {}),
        (by_cpo, {"of tokens": 2}),
    ],
)
def test_a_job_learns_the_same(train: Any, served: dict[str, int], bf16: bool, tmp_path: Path, npu: Any) -> None:
    """SFT, DPO and GRPO compute the log-probabilities of tokens from the hidden states themselves."""
    original = train(model_of("qwen3"), tmp_path, bf16=bf16)
    npu_patch.apply(**ONLY_THE_LOSS)
    patched = train(model_of("qwen3"), tmp_path, bf16=bf16)
    report = npu_patch.report()
    ran, reasons = calls_of(report)
    assert len(original) == len(patched) >= 2
    for one, other in zip(patched, original, strict=True):
        assert one == pytest.approx(other, rel=2e-2 if bf16 else 1e-4, abs=1e-2 if bf16 else 1e-5)
    assert +ran == served, reasons
    looked_at = [reason for reason in reasons if "looked at" in reason]
    assert len(looked_at) == (train in (by_evaluating_trainer, by_cpo))


def of_a_policy(model: torch.nn.Module, ids: Tensor, kept: int, temperature: float) -> list[Tensor]:
    """As trl's GRPO took them from logits, up to version 1."""
    from trl.trainer import utils

    logits = model(input_ids=ids, logits_to_keep=kept + 1).logits
    logits = logits[:, :-1, :][:, -kept:, :] / temperature
    return [utils.selective_log_softmax(logits, ids[:, -kept:]), utils.entropy_from_logits(logits)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "gemma2, soft cap", "cohere, scale"])
def test_log_probabilities_of_tokens_are_taken_without_logits(
    name: str, dtype: torch.dtype, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name).to(npu, dtype)
    ids = tiny_batch(length=60)["input_ids"].to(npu)
    parameters = list(model.parameters())
    weights = torch.linspace(0.1, 1.0, 50, device=npu)

    def step() -> tuple[list[Tensor], int]:
        hidden = model.model(input_ids=ids)  # whose masks are larger than the logits
        with mock.patch.object(model.model, "forward", lambda **kwargs: hidden), Largest() as largest:
            found = of_a_policy(model, ids, 50, 0.7)
            total = (found[0].float() * weights).sum() + 0.01 * found[1].float().sum()
            torch.autograd.grad(total, model.lm_head.weight, retain_graph=True)
        grads = torch.autograd.grad(total, parameters)
        return [*(each.detach() for each in found), *grads], largest.elements

    expected, largest = step()
    assert largest >= 2 * 50 * VOCABULARY
    npu_patch.apply(model, **ONLY_THE_LOSS)
    found, largest = step()
    assert largest < 2 * 50 * VOCABULARY
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, other) < (1e-6 if dtype == torch.float32 else 3e-2)
    with torch.no_grad():
        reference = of_a_policy(model.eval(), ids, 50, 0.7)
    assert all(torch.equal(one, other) for one, other in zip(reference, found, strict=False))  # and its reference
    ran, reasons = calls_of(npu_patch.report())
    assert ran == {"forward": 2, "loss": 0, "of tokens": 4} and not reasons


def test_generation_beside_trl_is_the_original_one(npu: torch.device) -> None:
    model, ids = model_of("qwen3").to(npu).eval(), tiny_batch()["input_ids"].to(npu)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    npu_patch.apply(model, **ONLY_THE_LOSS)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    ran, reasons = calls_of(npu_patch.report())
    assert ran["forward"] == 0 and reasons == {"logits of single tokens": 1}  # of the prompt; the others do not ask
