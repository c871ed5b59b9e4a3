"""What is made again in the backward is not kept, and gives the same gradients: the op, and SwiGLU layers with it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import npu_patch
from npu_patch.ops.recomputed import recomputed
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.needs_triton import needs_triton
from tests.support.tiny_models import COMMON, tiny, tiny_batch


def product_of(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33,), (2, 5, 33)])
def test_consumers_of_a_product_that_is_not_kept_have_the_same_gradients(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Two consumers, as LoRA makes of a linear layer, and a view."""
    torch.manual_seed(0)
    gate, up = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, branch = (torch.randn(6, shape[-1], dtype=dtype, requires_grad=True) for _ in range(2))

    def consume(h: Tensor) -> Tensor:
        return (
            F.linear(h, weight).sum()
            + F.linear(h.flatten(), branch.flatten().repeat(h.numel() // h.shape[-1])[: h.numel()].view(1, -1)).sum()
        )

    leaves = (gate, up, weight, branch)
    wanted = torch.autograd.grad(consume(product_of(gate, up)), leaves)
    product = product_of(gate, up)
    with recomputed(product, product_of, gate, up):
        y = consume(product)
    storage = StorageWeakRef(product.untyped_storage())
    del product
    gc.collect()
    assert storage.expired()
    for _ in range(2):  # a second backward makes it again
        for found, expected in zip(torch.autograd.grad(y, leaves, retain_graph=True), wanted, strict=True):
            assert torch.equal(found, expected)


def held_by_the_graph(model: torch.nn.Module) -> tuple[int, dict[str, Tensor]]:
    """Bytes that a forward leaves on the device, and loss and gradients of the step."""
    model.zero_grad(set_to_none=True)
    batch = {name: tensor.to("npu") for name, tensor in tiny_batch().items()}
    gc.collect()
    before = torch.npu.memory_allocated()
    loss = model(**batch, use_cache=False).loss
    gc.collect()
    held = torch.npu.memory_allocated() - before
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return held, {"loss": loss.detach(), **gradients}


def one_projection() -> torch.nn.Module:
    """A family with gate and up in one projection."""
    config = transformers.Phi3Config(**{**COMMON, "hidden_size": 96})
    torch.manual_seed(0)
    return transformers.Phi3ForCausalLM(config).float().eval()


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("make", "triton"),
    [
        (lambda: tiny("qwen3"), False),
        pytest.param(lambda: tiny("qwen3"), True, marks=needs_triton),
        (one_projection, False),
    ],
    ids=["two projections, npu_swiglu", "two projections, Triton", "one projection, npu_swiglu"],
)
def test_layers_keep_less_by_their_products_and_have_the_same_gradients(
    make: Callable[[], torch.nn.Module], triton: bool, lora: bool, npu: torch.device
) -> None:
    model = make().to(npu)
    if lora:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with npu_patch.applied(model, triton=triton):
        held_by_the_graph(model)  # whatever is made once
        held, expected = held_by_the_graph(model)
    with npu_patch.applied(model, triton=triton, swiglu_recompute=True) as report:
        less, found = held_by_the_graph(model)
    layers, tokens, width = 2, tiny_batch()["input_ids"].numel(), COMMON["intermediate_size"]
    assert held - less >= layers * tokens * width * 4
    assert {outcome.calls.ran for outcome in report.patched if outcome.patch == "swiglu"} == {2}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_keep_nothing_more(reentrant: bool, npu: torch.device) -> None:
    """Non-reentrant checkpointing packs what is kept itself: gate and up must not be held past it."""
    model = tiny("qwen3").to(npu).train()
    expected = loss_and_gradients(model, tiny_batch())
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    gates: list[StorageWeakRef] = []
    layers = [layer for name, layer in model.named_modules() if name.endswith("mlp.gate_proj")]
    hooks = [
        each.register_forward_hook(lambda *given: gates.append(StorageWeakRef(given[2].untyped_storage())))
        for each in layers
    ]
    with npu_patch.applied(model, swiglu_recompute=True):
        loss = model(**{name: tensor.to(npu) for name, tensor in tiny_batch().items()}, use_cache=False).loss
        gc.collect()
        assert len(gates) == 2 and all(gate.expired() for gate in gates)
        loss.backward()
    for hook in hooks:
        hook.remove()
    assert len(gates) == 4
    errors = {name: relative_error(each.grad.cpu().double(), expected[name]) for name, each in model.named_parameters()}
    assert max(errors.values()) < 1e-6


def test_a_consumer_that_changes_the_product_first_keeps_what_it_made_of_it() -> None:
    gate, up, weight = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(((F.silu(gate) * up).mul(2.0) @ weight).sum(), (gate, up, weight))
    product = F.silu(gate) * up
    with recomputed(product, lambda gate, up: F.silu(gate) * up, gate, up):
        result = product.mul_(2.0) @ weight
    for found, wanted in zip(torch.autograd.grad(result.sum(), (gate, up, weight)), expected, strict=True):
        assert torch.equal(found, wanted)
