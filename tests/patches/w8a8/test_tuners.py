"""peft's methods on int8 weights compute what they do on dequantised ones, or are refused and change nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.config import KasaConfig, VeloraConfig
from torch import Tensor, nn

import npu_patch
from npu_patch.ops.w8a8.dequantised import dequantised
from npu_patch.ops.w8a8.layer import W8A8Linear
from npu_patch.patches.w8a8.tuners import BESIDE, NO_LINEAR

WIDTH = 64
SETTINGS: dict[str, dict[str, Any]] = {
    "IA3": {"feedforward_modules": []},
    "ADALORA": {"total_step": 10},
    "C3A": {"block_size": 32},
    "VBLORA": {"vector_length": 16},
}
OF_TASKS = ("POLY",)  # asks for the ids of tasks in each call
METHODS = {kind.value: kind for kind in PEFT_TYPE_TO_TUNER_MAPPING}
PACKAGES = {name: PEFT_TYPE_TO_TUNER_MAPPING[kind].__module__.split(".")[2] for name, kind in METHODS.items()}
ASKED = [name for name, package in PACKAGES.items() if package in BESIDE and name not in OF_TASKS]
READING: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("HRA", "HIRA", "DEFT", "PEANUT", "UNILORA", "DELORA", "SHIRA") if name in METHODS},
    "MISS, bat": ("MISS", {"init_weights": "bat"}),
    "LoRA, KaSA": ("LORA", {"kasa_config": KasaConfig()}),
    "LoRA, VeLoRA": ("LORA", {"velora_config": VeloraConfig()}),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = W8A8Linear(WIDTH, WIDTH, dtype=torch.float32), nn.Linear(WIDTH, 4)
        weight = torch.randn(WIDTH, WIDTH)
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.layer.weight.data.copy_((weight / scale).round())
        self.layer.weight_scale.data.copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x) / 8))


def dense(model: Model) -> nn.Module:
    other = copy.deepcopy(model)
    other.layer = nn.Linear(WIDTH, WIDTH, bias=False)
    other.layer.weight = nn.Parameter(dequantised(model.layer.weight, model.layer.weight_scale), requires_grad=False)
    return other


def adapted(model: nn.Module, name: str, **more: Any) -> Any:
    config = PEFT_TYPE_TO_CONFIG_MAPPING[METHODS[name]]
    torch.manual_seed(1)
    return get_peft_model(model, config(target_modules=["layer"], **SETTINGS.get(name, {}), **more))


def step(model: Any, x: Tensor) -> list[Tensor]:
    torch.manual_seed(2)
    trained = [each for each in model.parameters() if each.requires_grad]
    for each in trained:
        each.data.add_(torch.randn_like(each) / 20)
    result = model(x)
    result.square().sum().backward()
    return [result.detach(), torch.cat([each.grad.flatten() for each in trained])]


@pytest.fixture(autouse=True)
def applied() -> Iterator[None]:
    torch.manual_seed(0)
    with npu_patch.applied(device="cpu"):
        yield


@pytest.mark.parametrize("name", sorted(ASKED))
def test_methods_that_compute_beside_a_layer_do_so_beside_int8(name: str) -> None:
    model, x = Model(), torch.randn(5, WIDTH)
    plain = dense(model)
    for found, expected in zip(step(adapted(model, name), x), step(adapted(plain, name), x), strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("how", READING)
def test_methods_that_read_weights_are_refused_before_anything_is_changed(how: str) -> None:
    model, (name, more) = Model(), READING[how]
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"the model has int8 weights \(layer\): .*weights"):
        adapted(model, name, **more)
    assert dict(model.named_modules()) == before
    adapted(dense(model), name, **more)  # of other weights they are peft's


@pytest.mark.parametrize("how", ["HRA", "LoRA, VeLoRA"])
def test_the_report_names_those_that_are_there_already(how: str) -> None:
    npu_patch.restore()
    name, more = READING[how]
    model = adapted(Model(), name, **more)
    with npu_patch.applied(model, device="cpu") as report:
        (found,) = [each for each in report.skipped if each.patch == "w8a8_peft"]
    assert f"peft.tuners.{name.lower()}" in found.site and "what it computes on int8 weights is wrong" in found.reason


def test_every_method_of_this_peft_is_known_or_refused() -> None:
    """A new one is refused until somebody has looked."""
    assert {*BESIDE, *NO_LINEAR} - {*PACKAGES.values()} <= {"ln_tuning", "trainable_tokens", "xlora"}
    assert PeftType.LORA.value in ASKED and len(ASKED) > 15
