"""transformers' LabelSmoother: the loss and every gradient without logits, in jobs of the Trainer and by itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.trainer_pt_utils import LabelSmoother

import npu_patch
from npu_patch.ops import chunked_loss
from npu_patch.ops.readings import NotRead
from npu_patch.probe.losses import read_label_smoothing
from tests.patches.loss.test_loss import VOCABULARY, calls_of, model_of, only_the_loss
from tests.support.gradients import in_float64, relative_error
from tests.support.largest_tensor import Largest
from tests.support.tiny_models import COMMON, tiny_batch
from tests.support.training_modes import MODES

ORIGINAL = LabelSmoother.__call__
SMOOTHER = LabelSmoother(epsilon=0.15)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "ELEMENTS", 16 * VOCABULARY)


def adapted(name: str, head: bool = False) -> torch.nn.Module:
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.25,
        target_modules=["q_proj", "v_proj", *(["lm_head"] if head else [])],
        init_lora_weights=False,
    )
    model = model_of(name)
    torch.manual_seed(1)
    return get_peft_model(model, config).train()


def step(model: torch.nn.Module, shift_labels: bool = True, **given: Any) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in tiny_batch().items()}
    labels = batch.pop("labels")
    model.zero_grad()
    torch.manual_seed(2)  # of the dropout
    loss = SMOOTHER(model(**batch), labels, shift_labels=shift_labels, **given)
    loss.backward()
    return {"loss": loss.detach()} | {
        name: each.grad for name, each in model.named_parameters() if each.grad is not None
    }


@pytest.mark.parametrize("number", [None, 31, "tensor"])
@pytest.mark.parametrize("shift_labels", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "llama, tied", "gemma2, soft cap", "cohere, scale"])
def test_loss_and_gradients_of_adapters_are_the_original_ones(
    name: str, shift_labels: bool, number: Any, npu: torch.device
) -> None:
    model = adapted(name, head=name == "qwen3").to(npu)
    number = torch.tensor(17, device=npu) if number == "tensor" else number
    expected = step(model, shift_labels, num_items_in_batch=number)
    with only_the_loss(model) as report:
        found = step(model, shift_labels, num_items_in_batch=number)
    assert calls_of(report) == ({"forward": 1, "loss": 1}, {})
    assert found.keys() == expected.keys() and len(found) > 8
    for each in expected:
        assert found[each].dtype == expected[each].dtype
        assert relative_error(found[each], expected[each]) < 1e-6, each


@pytest.mark.parametrize("mode", MODES)
def test_within_every_way_to_train(mode: str, npu: torch.device) -> None:
    model = model_of("qwen3").to(npu)
    with MODES[mode](model):
        expected = step(model)
        with only_the_loss(model) as report:
            found = step(model)
    assert calls_of(report) == ({"forward": 1, "loss": 1}, {})
    for each in expected:
        assert relative_error(found[each], expected[each]) < 1e-6, each


@pytest.mark.parametrize("name", ["qwen3", "gemma2, soft cap"])
def test_bfloat16_is_no_further_from_float64_than_the_original(name: str, npu: torch.device) -> None:
    model = model_of(name).bfloat16()
    exact = step(in_float64(model))
    model = model.to(npu)
    theirs = step(model)
    with only_the_loss(model):
        ours = step(model)

    def off(found: dict[str, Tensor]) -> float:
        return sum(relative_error(found[each].double().cpu(), exact[each]) ** 2 for each in exact) ** 0.5

    assert ours["loss"].dtype == theirs["loss"].dtype
    assert off(ours) <= 1.1 * off(theirs)


def test_gradients_in_float16_outlast_what_a_scaler_takes_back(npu: torch.device) -> None:
    """Before GradScaler's factor they would be smaller than float16 can tell from nothing."""
    model = model_of("qwen3").to(npu)

    def scaled() -> Tensor:
        model.zero_grad()
        batch = {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
        labels = batch.pop("labels")
        with torch.autocast("npu", torch.float16):
            loss = SMOOTHER(model(**batch), labels, shift_labels=True, num_items_in_batch=10**7)
        (loss * 2.0**24).backward()
        return model.lm_head.weight.grad / 2.0**24

    expected = scaled()
    with only_the_loss(model) as report:
        found = scaled()
    assert calls_of(report) == ({"forward": 1, "loss": 1}, {})
    assert relative_error(found, expected) < 2e-3


def test_nothing_as_large_as_the_logits_ever_exists(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, rows = 4000, 2 * 59
    monkeypatch.setattr(chunked_loss, "ELEMENTS", 16 * vocabulary)
    model = model_of("qwen3", vocab_size=vocabulary).to(npu)
    batch = {name: tensor.to(npu) for name, tensor in tiny_batch(length=60).items()}
    labels = batch.pop("labels")

    def largest() -> int:
        hidden = model.model(**batch)  # whose masks are larger than the logits
        with mock.patch.object(model.model, "forward", lambda **kwargs: hidden), Largest() as found:
            torch.autograd.grad(SMOOTHER(model(**batch), labels, shift_labels=True), model.lm_head.weight)
        return found.elements

    assert largest() >= rows * vocabulary
    with only_the_loss(model):
        assert largest() <= COMMON["hidden_size"] * vocabulary < rows * vocabulary  # as the gradient of the head


def test_the_same_bits_in_training_and_evaluation_and_without_gradients(npu: torch.device) -> None:
    model, batch = model_of("gemma3, soft cap").to(npu), {n: t.to(npu) for n, t in tiny_batch().items()}
    labels = batch.pop("labels")
    npu_patch.apply(model)
    wanted = SMOOTHER(model(**batch), labels, shift_labels=True).detach()
    model.eval()
    for grad_mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with grad_mode():
            assert torch.equal(SMOOTHER(model(**batch), labels, shift_labels=True), wanted)
            assert torch.equal(SMOOTHER(model(**batch, return_dict=False), labels, shift_labels=True), wanted)


@pytest.mark.parametrize("ignored", ["by -100", "all", "by another number"])
def test_labels_that_do_not_count(ignored: str, npu: torch.device) -> None:
    model, batch = model_of("qwen3").to(npu), {n: t.to(npu) for n, t in tiny_batch().items()}
    labels = batch.pop("labels")
    smoother = LabelSmoother(0.2, ignore_index=7 if ignored == "by another number" else -100)
    if ignored == "all":
        labels = torch.full_like(labels, -100)
    elif ignored == "by another number":
        labels[1, 4:8] = 7  # and -100 is the first word of the vocabulary, as it is to the original
    expected = smoother(model(**batch), labels)
    with only_the_loss(model) as report:
        found = smoother(model(**batch), labels)
    assert calls_of(report)[0] == {"forward": 1, "loss": 1}
    assert torch.allclose(found, expected, rtol=1e-6, equal_nan=True)


def test_logits_that_are_there_and_odd_smoothers_are_left_to_the_original(npu: torch.device) -> None:
    model, batch = model_of("qwen3").to(npu), {n: t.to(npu) for n, t in tiny_batch().items()}
    labels = batch.pop("labels")
    logits = model(**batch).logits
    odd = LabelSmoother(torch.tensor(0.1, device=npu))
    expected = SMOOTHER({"logits": logits}, labels), odd(model(**batch), labels)
    with only_the_loss(model) as report:
        found = SMOOTHER({"logits": logits}, labels), odd(model(**batch), labels)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    ran, reasons = calls_of(report)
    assert ran["loss"] == 0 and reasons["logits that are there already"] == 1 and reasons.total() == 3


def train(model: torch.nn.Module, folder: Path, **settings: Any) -> list[float]:
    ids = [[(7 * row + column) % 97 + 2 for column in range(24)] for row in range(8)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-3,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        label_smoothing_factor=0.1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        **settings,
    )
    rows = [{"input_ids": each, "labels": [-100, *each[1:]]} for each in ids]
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("when", ["before the model", "given the model"])
def test_a_job_of_the_trainer_learns_the_same_without_logits(
    when: str, bf16: bool, tmp_path: Path, npu: torch.device
) -> None:
    original = train(adapted("qwen3"), tmp_path, bf16=bf16)
    if when == "before the model":
        npu_patch.apply(fused_ops=False, moe_patch=False, fla=False)
    model = adapted("qwen3")
    if when == "given the model":
        npu_patch.apply(model, fused_ops=False, moe_patch=False, fla=False)
    patched = train(model, tmp_path, bf16=bf16)
    assert calls_of(npu_patch.report()) == ({"forward": 6, "loss": 6}, {})
    assert len(original) == 3 and patched == pytest.approx(original, rel=2e-2 if bf16 else 1e-5)


def test_a_job_of_trl_learns_the_same(tmp_path: Path, npu: torch.device) -> None:
    pytest.importorskip("trl")
    from tests.patches.loss.test_loss_trainers import by_sft

    original = by_sft(model_of("qwen3"), tmp_path, label_smoothing_factor=0.1, bf16=False)
    npu_patch.apply(fused_ops=False, moe_patch=False, fla=False)
    patched = by_sft(model_of("qwen3"), tmp_path, label_smoothing_factor=0.1, bf16=False)
    ran, reasons = calls_of(npu_patch.report())
    assert ran["loss"] == 2, reasons
    for one, other in zip(patched, original, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("shift_labels", [True, False])
def test_logits_that_were_written_to_are_smoothed_as_they_are_now(shift_labels: bool, npu: torch.device) -> None:
    model = model_of("qwen3").to(npu)

    def loss() -> Tensor:
        batch = {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
        labels = batch.pop("labels")
        outputs = model(**batch)
        outputs.logits[..., 0] = -1e4
        return SMOOTHER(outputs, labels, shift_labels=shift_labels)

    expected = loss()
    with only_the_loss(model):
        assert relative_error(loss(), expected) < 1e-6


def test_the_call_is_put_back(npu: torch.device) -> None:
    npu_patch.apply()
    assert LabelSmoother.__call__ is not ORIGINAL
    npu_patch.restore()
    assert LabelSmoother.__call__ is ORIGINAL


def _over_the_other_words(self: Any, model_output: Any, labels: Tensor, shift_labels: bool = False) -> Tensor:
    """A share for every word but the label, as fairseq spread it."""
    each = -model_output["logits"].log_softmax(-1)
    ignored = labels == self.ignore_index
    of_label = each.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1).masked_fill(ignored, 0.0)
    others = (each.sum(-1).masked_fill(ignored, 0.0) - of_label) / (each.shape[-1] - 1)
    return ((1 - self.epsilon) * of_label + self.epsilon * others).sum() / (~ignored).sum()


def _weighted(self: Any, model_output: Any, labels: Tensor, weight: Any = None) -> Tensor:
    return model_output["logits"].sum()


@pytest.mark.parametrize(
    ("function", "reason"),
    [(_over_the_other_words, "something else"), (_weighted, "takes model_output, labels, weight")],
)
def test_another_smoothing_is_not_taken_for_it(function: Any, reason: str) -> None:
    @dataclasses.dataclass
    class Smoother:
        epsilon: float = 0.1
        ignore_index: int = -100

    reading = read_label_smoothing(Smoother, function)
    assert isinstance(reading, NotRead) and reason in reading.reason
