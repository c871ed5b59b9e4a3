"""Layers of int8 weights in a model: the bits of the plain layers, by the operators, in every mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import npu_patch
from npu_patch import simulator
from npu_patch.ops.w8a8.layer import W8A8Linear
from npu_patch.ops.w8a8.quantised import by_token
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
from tests.support.generating import COMPARED, STATIC, calls_of, tokens
from tests.support.gradients import loss_and_gradients
from tests.support.tiny_models import tiny, tiny_batch
from tests.support.w8a8 import in_int8, int8_layer

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANT, PRODUCT = "npu::npu_dynamic_quant", "npu::npu_quant_matmul"
OWN = W8A8Linear.forward
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "with gradients": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def site(report: Report) -> Outcome:
    (found,) = [each for each in report.patched if each.patch == "w8a8"]
    return found


def on(npu: torch.device, family: str = "qwen3", dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> Any:
    return in_int8(tiny(family, **sizes).to(dtype)).to(npu)


def with_lora(model: nn.Module) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def logits(model: Any, **given: Any) -> Tensor:
    ids = tiny_batch()["input_ids"].to(next(model.parameters()).device)
    return model(input_ids=ids, use_cache=False, **given).logits.detach().cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_gives_the_bits_of_the_plain_layers(dtype: torch.dtype, npu: torch.device) -> None:
    model = on(npu, dtype=dtype)
    with npu_patch.applied(model, w8a8=False, fused_ops=False):
        expected = logits(model)
    with npu_patch.applied(model, fused_ops=False) as report, simulator.count() as counted:
        assert torch.equal(logits(model), expected)
    found = site(report)
    assert found.calls.ran == found.layers == 14 and not found.calls.fell_through
    assert counted.by_op[PRODUCT][0] == 14
    # q, k and v share one, gate and up another; of float32 it is torch that quantises.
    assert counted.by_op.get(QUANT, (0,))[0] == (0 if dtype == torch.float32 else 8)
    assert W8A8Linear.forward is OWN


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "qwen3_5_moe", "gemma3", "glm4_moe"])
def test_other_families_do_too_beside_the_other_patches(family: str, npu: torch.device) -> None:
    model = on(npu, family)
    with npu_patch.applied(model, w8a8=False):
        expected = logits(model)
    with npu_patch.applied(model) as report:
        assert torch.equal(logits(model), expected)
    found = site(report)
    assert found.calls.ran == found.layers > 0 and not found.calls.fell_through


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_the_same_bits_whoever_watches(autocast: bool, adapted: bool, npu: torch.device) -> None:
    model = on(npu, dtype=torch.float32 if autocast else torch.bfloat16)
    model = with_lora(model) if adapted else model
    found = []
    with npu_patch.applied(model), torch.autocast("npu", torch.bfloat16, enabled=autocast):
        for mode in MODES.values():
            for training in (False, True):
                with mode():
                    found.append(logits(model.train(training)))
    assert len(found) == 6 and all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["whole", "non-reentrant", "reentrant"])
def test_adapters_on_top_get_the_gradients_that_plain_layers_give_them(
    checkpointed: bool | None, autocast: bool, npu: torch.device
) -> None:
    model = with_lora(on(npu, dtype=torch.float32 if autocast else torch.bfloat16)).train()
    if checkpointed is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointed})
        model.enable_input_require_grads()
    found = []
    for switches in ({"w8a8": False, "lora": False}, {"lora": False}):  # with lora they are one function: test_lora.py
        with npu_patch.applied(model, **switches), torch.autocast("npu", torch.bfloat16, enabled=autocast):
            found.append(loss_and_gradients(model, tiny_batch()))
    plain, served = found
    adapters = [name for name, each in model.named_parameters() if each.requires_grad]
    assert len(adapters) == 28 and set(served) == {"loss", *adapters} == set(plain)
    assert all(torch.equal(served[name], plain[name]) for name in served)
    assert all(bool((served[name] != 0).any()) for name in adapters)


class Rounding(nn.Linear):
    """A dense layer whose input is rounded to int8 by token, and its gradient is not."""

    def forward(self, x: Tensor) -> Tensor:
        rows = by_token(x.detach().flatten(0, -2))
        rounded = (rows.values * rows.scale[:, None]).view_as(x)
        return super().forward(x + (rounded - x).detach())


def test_gradients_are_those_of_a_dense_model_whose_inputs_are_rounded(npu: torch.device) -> None:
    model = with_lora(on(npu, dtype=torch.float32)).train()
    with npu_patch.applied(model):
        found = loss_and_gradients(model, tiny_batch())
    dense = copy.deepcopy(model).cpu()
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, W8A8Linear):
            linear = Rounding(layer.in_features, layer.out_features, bias=False)
            linear.weight.data = layer.weight.float() * layer.weight_scale
            dense.set_submodule(name, linear.requires_grad_(False))
    expected = loss_and_gradients(dense, tiny_batch())
    assert len(expected) == 29
    for name in expected:  # where a sum of float32 falls beside a step, a value is one further
        assert float((found[name] - expected[name]).norm() / expected[name].norm()) < 0.01, name


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("where", ["cpu", "npu"])
def test_it_compiles_whole_to_the_same_bits(where: str, adapted: bool, npu: torch.device) -> None:
    model = on(torch.device(where))
    model = with_lora(model) if adapted else model
    torch._dynamo.reset()
    with npu_patch.applied(model, device=where):
        expected = loss_and_gradients(model, tiny_batch())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(logits(compiled), logits(model))
        found = loss_and_gradients(compiled, tiny_batch())
    assert {name.removeprefix("_orig_mod.") for name in found} == set(expected)


def test_tokens_of_a_captured_step_are_those_of_the_steps(npu: torch.device) -> None:
    model = on(npu, dtype=torch.bfloat16, max_position_embeddings=256)
    with npu_patch.applied(model, w8a8=False, captured_decode=False):
        expected = tokens(model, 24)
    with npu_patch.applied(model):
        for _ in range(2):
            assert torch.equal(tokens(model, 24, **STATIC), expected)
        assert calls_of().ran == 2 * 23 - COMPARED and not calls_of().fell_through


@pytest.mark.parametrize("saved", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
@pytest.mark.parametrize("before", [False, True])
def test_selective_checkpointing_hands_each_layer_its_own(
    before: bool, saved: CheckpointPolicy, npu: torch.device
) -> None:
    """`before`: another layer was given the same input before the checkpoint, which runs without it when it is run
    again."""
    torch.manual_seed(0)
    q, k, v = layers = [int8_layer(nn.Linear(32, 32, dtype=torch.bfloat16)).to(npu) for _ in range(3)]
    x = torch.randn(4, 32).to(npu, torch.bfloat16).requires_grad_()

    def block(x: Tensor) -> Tensor:
        return q(x).sigmoid() * k(x) + v(x * 2).tanh()

    def policy(*_: Any, **__: Any) -> CheckpointPolicy:
        return saved

    (expected,) = torch.autograd.grad(block(x).sum(), x)
    with npu_patch.applied(nn.ModuleList(layers)):
        for _ in range(2):
            if before:
                v(x)
            contexts = partial(create_selective_checkpoint_contexts, policy)
            y = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            (found,) = torch.autograd.grad(y.sum(), x)
            assert torch.equal(found, expected)


def test_hooks_on_a_layer_hear_it(npu: torch.device) -> None:
    model = on(npu)
    heard: list[torch.Size] = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, given, y: heard.append(y.shape))
    with npu_patch.applied(model) as report:
        logits(model)
    assert len(heard) == 1 and site(report).calls.ran == 14


def test_what_it_leaves_to_the_plain_layer_is_counted_with_the_reason(npu: torch.device) -> None:
    layer = int8_layer(nn.Linear(8, 4, dtype=torch.bfloat16))
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    expected = layer(x)
    with npu_patch.applied(nn.Sequential(layer)) as report:
        assert torch.equal(layer(x), expected)
        layer.to(npu)(x.to(npu)[:0])
        layer.to(npu)(input=x.to(npu))
        assert torch.equal(torch.func.vmap(layer)(x.to(npu)).cpu(), expected)
    calls = site(report).calls
    assert calls.ran == 1 and set(calls.fell_through) == {
        "input on cpu",
        "an input of 0 elements, a weight [4, 8]",
        "within a transform of torch.func",
    }


def test_a_model_without_such_layers_has_no_line_of_it(npu: torch.device) -> None:
    report = npu_patch.apply(tiny("qwen3").to(npu))
    assert not [each for each in report if each.patch == "w8a8"] and "w8a8" not in str(report)


def test_without_a_model_layers_are_served_that_are_made_later(npu: torch.device) -> None:
    report = npu_patch.apply()
    layer = int8_layer(nn.Linear(8, 4, dtype=torch.bfloat16)).to(npu)
    layer(torch.ones(2, 8, dtype=torch.bfloat16, device=npu))
    assert site(report).calls.ran == 1


def test_flash_attention_of_float32_takes_no_weight_for_the_dtype_of_the_model(npu: torch.device) -> None:
    """transformers casts its inputs to the dtype of the first linear layer's weight."""
    model = on(npu, dtype=torch.float32)
    expected = logits(model)
    model.set_attn_implementation("flash_attention_2")
    with npu_patch.applied(model):
        assert float((logits(model) - expected).abs().max()) < 0.02
