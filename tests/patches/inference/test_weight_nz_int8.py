"""Int8 weights in FRACTAL_NZ: the same bits forward and backward, put back to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_npu
from torch import nn

import npu_patch
from npu_patch.ops import weight_format
from npu_patch.ops.w8a8.layer import W8A8Linear
from npu_patch.ops.w8a8.npu import WIDEST
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
from tests.support.generating import STATIC, calls_of, tokens
from tests.support.gradients import loss_and_gradients
from tests.support.tiny_models import tiny, tiny_batch
from tests.support.w8a8 import in_int8, int8_layer

ND, NZ = 2, 29
SIZES = {"hidden_size": 64, "intermediate_size": 96}


def on(npu: torch.device, **sizes: Any) -> Any:
    return in_int8(tiny("qwen3", **SIZES, **sizes).bfloat16()).to(npu).requires_grad_(False)


def outcome(report: Report) -> Outcome:
    (found,) = [each for each in report if each.patch == "weight_nz"]
    return found


def int8_formats(model: nn.Module) -> list[int]:
    layers = [layer for layer in model.modules() if isinstance(layer, W8A8Linear)]
    return [int(torch_npu.get_npu_format(layer.weight)) for layer in layers]


def of_embeddings(model: Any) -> tuple[Any, Any]:
    """Logits of an input that has a gradient, and that."""
    ids = tiny_batch()["input_ids"].to(model.device)
    given = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=given, use_cache=False).logits
    return logits.detach(), torch.autograd.grad(logits.float().square().sum(), given)[0]


def test_results_and_gradients_are_bitwise_those_of_plain_weights(npu: torch.device) -> None:
    model = on(npu)
    with npu_patch.applied(model):
        expected = of_embeddings(model)
    before = {name: (id(each), each.stride(), each.cpu().clone()) for name, each in model.named_parameters()}
    report = npu_patch.apply(model, weight_nz=True)
    assert outcome(report).status == "prepared" and outcome(report).layers == 14
    assert int8_formats(model) == [NZ] * 14
    found = of_embeddings(model)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert int8_formats(model) == [NZ] * 14
    npu_patch.restore()
    for name, each in model.named_parameters():
        identity, stride, values = before[name]
        assert (id(each), each.stride()) == (identity, stride) and torch.equal(each.cpu(), values)
    assert int8_formats(model) == [ND] * 14


def test_a_state_dict_has_plain_weights(npu: torch.device) -> None:
    model = on(npu)
    expected = {name: each.cpu().clone() for name, each in model.state_dict().items()}
    npu_patch.apply(model, weight_nz=True)
    found = model.state_dict()
    assert all(torch.equal(found[name].cpu(), values) for name, values in expected.items())
    assert int8_formats(model) == [ND] * 14
    assert torch.isfinite(of_embeddings(model)[0]).all()


def test_captured_steps_take_them(npu: torch.device) -> None:
    model = on(npu, max_position_embeddings=64)
    with npu_patch.applied(model):
        expected = tokens(model, 12, **STATIC)
    with npu_patch.applied(model, weight_nz=True):
        assert torch.equal(tokens(model, 12, **STATIC), expected)
        assert calls_of().ran > 0 and int8_formats(model) == [NZ] * 14


def test_adapters_beside_them_train_with_the_same_gradients(npu: torch.device) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(on(npu), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    found = []
    for switches in ({}, {"weight_nz": True}, {"weight_nz": True, "lora": False}):
        with npu_patch.applied(model, **switches):
            found.append(loss_and_gradients(model, tiny_batch()))
            assert set(int8_formats(model)) == {NZ if switches else ND}
    plain, laid, by_peft = found
    assert len(plain) == 29 and all(torch.equal(laid[name], plain[name]) for name in plain)
    assert by_peft.keys() == plain.keys()


def test_what_the_plain_layer_is_left_reads_it_as_rows(npu: torch.device) -> None:
    layer = int8_layer(nn.Linear(64, 96, dtype=torch.bfloat16)).to(npu).requires_grad_(False)
    model, x = nn.Sequential(layer), torch.randn(3, 64).to(npu, torch.bfloat16)
    with npu_patch.applied(model):
        expected = layer(x)
    with npu_patch.applied(model, weight_nz=True) as report:
        assert int8_formats(model) == [NZ]
        assert layer(x[:0]).shape == (0, 96)
        forward = W8A8Linear.forward.__wrapped__
        assert torch.equal(forward(layer, x), expected)
        assert torch.equal(layer(x), expected)
    assert outcome(report).layers == 1


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((64, 80), "1 of widths 80 and 64, no multiples of 32 and 16"),
        ((40, 64), "1 of widths 64 and 40, no multiples of 32 and 16"),
        ((16, WIDEST + 1), f"1 of widths {WIDEST + 1} and 16, wider than {WIDEST}"),
    ],
)
def test_widths_that_do_not_fit_are_left_with_the_reason(
    sizes: tuple[int, int], reason: str, npu: torch.device
) -> None:
    model = nn.Sequential(int8_layer(nn.Linear(*sizes, dtype=torch.bfloat16))).to(npu).requires_grad_(False)
    found = outcome(npu_patch.apply(model, weight_nz=True))
    assert found.status == "skipped" and reason in found.reason and int8_formats(model) == [ND]


def test_switched_off_they_stay_plain(npu: torch.device) -> None:
    model = on(npu)
    report = npu_patch.apply(model, weight_nz=True, w8a8=False)
    assert "of a W8A8Linear" in outcome(report).reason and int8_formats(model) == [ND] * 14


def test_a_device_whose_product_is_wrong_keeps_plain_ones(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_format, "_int8_is_exact", lambda integers: False)
    model = on(npu)
    found = outcome(npu_patch.apply(model, weight_nz=True))
    assert found.status == "skipped" and "is wrong on this device in torch.int8" in found.reason
    assert int8_formats(model) == [ND] * 14
