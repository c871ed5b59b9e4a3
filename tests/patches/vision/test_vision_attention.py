"""Vision attention in one call: for images, windows and videos, in every mode, and what it leaves as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_patch
from npu_patch import simulator
from npu_patch.numerics.values import values
from npu_patch.patches.attention.checked import checks
from npu_patch.patches.vision.attention import PATCH
from npu_patch.sites.sites import LiveModules
from tests.support.vision_cases import FULL, IMAGES, LANGUAGE, batch_of, made, results

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def outcomes() -> list[Any]:
    return [each for each in npu_patch.report().outcomes if each.patch == PATCH.name and each.layers]


@pytest.fixture(params=FAMILIES)
def layer(request: pytest.FixtureRequest, npu: torch.device) -> Iterator[torch.nn.Module]:
    """A patched one of a tower."""
    model = made(request.param, FULL).to(npu)
    npu_patch.apply(model)
    found = next(each for name, each in model.named_modules() if name.endswith("blocks.0.attn"))
    found.model = [model]  # it lives as long
    return found


def arguments(layer: torch.nn.Module, device: torch.device) -> dict[str, Any]:
    head_dim = layer.qkv.in_features // layer.num_heads
    tables = tuple(values((12, head_dim), seed).to(device) for seed in (1, 2))
    lengths = torch.tensor([0, 4, 5, 12], dtype=torch.int32, device=device)
    return {"cu_seqlens": lengths, "position_embeddings": tables}


def run(layer: torch.nn.Module, device: torch.device, **changed: Any) -> list[Tensor]:
    x = values((12, layer.qkv.in_features), 3).to(device).requires_grad_()
    layer.zero_grad()
    out = layer(x, **{**arguments(layer, device), **changed})
    if not out.requires_grad:
        return [out.cpu()]
    out.square().sum().backward()
    return [each.detach().cpu() for each in (out, x.grad, layer.qkv.weight.grad, layer.proj.weight.grad)]


def unpatched(layer: torch.nn.Module) -> list[Tensor]:
    on_cpu = copy.deepcopy(layer).cpu()
    return run(on_cpu, torch.device("cpu"))


@pytest.mark.usefixtures("simulated")
def test_a_row_of_segments_is_one_call(layer: torch.nn.Module, npu: torch.device) -> None:
    expected = unpatched(layer)
    run(layer, npu)
    with simulator.count() as counted:
        found = run(layer, npu)
    assert counted.by_op["npu::npu_fusion_attention"][0] == 1
    assert counted.by_op["npu::npu_fusion_attention_grad"][0] == 1
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-5) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_other_modes_give_the_same_bits(mode: Any, layer: torch.nn.Module, npu: torch.device) -> None:
    trained = run(layer.train(), npu)[0]
    with mode():
        found = layer.eval()(values((12, layer.qkv.in_features), 3).to(npu), **arguments(layer, npu))
    assert torch.equal(found.cpu(), trained)


def test_hooks_on_its_projections_are_heard_once(layer: torch.nn.Module, npu: torch.device) -> None:
    heard: list[int] = []
    layer.qkv.register_forward_hook(lambda *_: heard.append(1))
    run(layer, npu)
    assert heard == [1] and outcomes()[0].calls.ran == 1


@pytest.mark.parametrize(
    ("asked", "reason"),
    [("eager", "its attention is eager"), ("flash_attention_2", "its attention is flash_attention_2")],
)
def test_a_model_that_asks_for_another_attention_is_left_alone(
    asked: str, reason: str, layer: torch.nn.Module, npu: torch.device
) -> None:
    layer.config._attn_implementation = asked
    run(layer, npu)
    (outcome,) = [each for each in outcomes() if each.calls.fell_through]
    assert dict(outcome.calls.fell_through) == {reason: 1}


def test_what_flash_attention_does_not_take_runs_segment_by_segment(layer: torch.nn.Module, npu: torch.device) -> None:
    expected = unpatched(layer)
    found = run(layer, npu, output_attentions=True)
    assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-5) for one, other in zip(found, expected, strict=True))
    (outcome,) = [each for each in outcomes() if each.calls.fell_through]
    assert outcome.calls.ran == 0 and [each for each in outcome.calls.fell_through if "fell through" in each]


@pytest.mark.parametrize("switch", ["vision", "vision_attention", "sdpa"])
def test_switches_turn_it_off(switch: str, npu: torch.device) -> None:
    model = made("qwen2_5_vl", LANGUAGE).to(npu)
    npu_patch.apply(model, **{switch: False})
    results(model, batch_of(copy.deepcopy(model).cpu(), "qwen2_5_vl", IMAGES))
    assert not [each for each in outcomes() if each.calls.ran]


def test_the_layer_and_its_config_stay_what_they_are(layer: torch.nn.Module, npu: torch.device) -> None:
    before = dict(vars(layer)), copy.deepcopy(layer.config.to_dict())
    run(layer, npu)
    assert dict(vars(layer)) == before[0] and layer.config.to_dict() == before[1]
    assert layer.config._attn_implementation == "sdpa"


def test_towers_are_among_what_is_checked_on_a_real_device() -> None:
    model = made("qwen2_5_vl", FULL)
    (head_dim,) = {each.head_dim for name, each in model.named_modules() if name.endswith(".attn")}
    text = model.config.text_config
    assert head_dim != text.hidden_size // text.num_attention_heads
    names = [case.name for case in checks("flash_attention_2", LiveModules(model))]
    assert [each for each in names if each.startswith("packed") and f"heads of {head_dim} " in each]
