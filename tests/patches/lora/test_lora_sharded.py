"""Adapted models that fully_shard holds, with the loss patched too: whatever is sharded by itself, the numbers and
every gradient are the original ones, and what is not served says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as AdaptedLinear
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import npu_patch
from npu_patch.ops import chunked_loss
from tests.patches.loss.test_loss import VOCABULARY, calls_of, model_of
from tests.support.gradients import relative_error
from tests.support.lora_models import fell_through, ran
from tests.support.tiny_models import tiny_batch

ONLY_THESE = {"fused_ops": False, "moe_patch": False, "fla": False}


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(chunked_loss, "ELEMENTS", 16 * VOCABULARY)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    yield
    npu_patch.restore()
    dist.destroy_process_group()


def adapted(head: bool, dropout: float = 0.1) -> Any:
    model = model_of("qwen3")
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", *(["lm_head"] * head)]
    config = LoraConfig(r=4, lora_alpha=3, lora_dropout=dropout, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, config).train()


def layers(model: Any, **how: Any) -> None:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, **how)
    fully_shard(model, **how)


def first(kind: Callable[[AdaptedLinear], list[torch.nn.Module]]) -> Callable[[Any], None]:
    def shard(model: Any) -> None:
        for each in model.modules():
            if isinstance(each, AdaptedLinear):
                for part in kind(each):
                    fully_shard(part)
        layers(model)

    return shard


SHARDED: dict[str, tuple[Callable[[Any], None], str | None]] = {
    "layers": (layers, None),
    "layers, kept for the backward": (lambda model: layers(model, reshard_after_forward=False), None),
    "adapted linears": (first(lambda each: [each]), None),
    "base layers": (first(lambda each: [each.base_layer]), "hooks on base_layer"),
    "adapters": (first(lambda each: [each.lora_A["default"], each.lora_B["default"]]), "hooks on lora_A"),
}


def two_steps(model: Any, device: torch.device) -> dict[str, Tensor]:
    """The second finds what the first left."""
    batch = {key: tensor.to(device) for key, tensor in tiny_batch().items()}
    found: dict[str, Tensor] = {}
    for number in range(2):
        torch.manual_seed(2)
        loss = model(**batch).loss
        loss.backward()
        found[f"loss {number}"] = loss.detach()
    grads = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return found | {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("head", [False, True], ids=["", "adapted head"])
@pytest.mark.parametrize("name", SHARDED)
def test_loss_and_gradients_are_the_original_ones(
    name: str, head: bool, checkpointing: bool, npu: torch.device
) -> None:
    shard, reason = SHARDED[name]
    count = 14

    def steps() -> dict[str, Tensor]:
        model = adapted(head).to(npu)
        assert sum(isinstance(each, AdaptedLinear) for each in model.modules()) == count + head
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        shard(model)
        return two_steps(model, npu)

    expected = steps()
    with npu_patch.applied(**ONLY_THESE) as report:
        found = steps()
    head_is_heard = head and not name.startswith("layers")  # it is sharded by itself then, too
    reasons = {reason} if reason else set()
    if head and not head_is_heard:
        reasons.add("its product waits for the loss")
    assert set(fell_through(report)) == reasons
    ours = count + (head and name == "adapted linears")
    assert ran(report) == (0 if reason else 2 * (count * (1 + checkpointing) + ours - count))
    ran_of_loss, reasons_of_loss = calls_of(report)
    assert +ran_of_loss == ({} if head_is_heard else {"forward": 2, "loss": 2})
    assert any("hooks on" in each for each in reasons_of_loss) == head_is_heard
    assert found.keys() == expected.keys() and len(found) == 2 + 2 * (count + head)
    for each in expected:
        assert relative_error(found[each], expected[each]) < 3e-6, each


@pytest.mark.parametrize("head", [False, True], ids=["", "adapted head"])
def test_what_it_gathers_in_half_precision_is_no_further_from_float64(head: bool, npu: torch.device) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def off() -> float:
        model = adapted(head, dropout=0.0).to(npu)
        layers(model, mp_policy=policy)
        found = two_steps(model, npu)
        return sum(relative_error(found[each].double().cpu(), exact[each]) ** 2 for each in exact) ** 0.5

    exact = two_steps(adapted(head, dropout=0.0).double(), torch.device("cpu"))
    theirs = off()
    with npu_patch.applied(**ONLY_THESE) as report:
        ours = off()
    assert ran(report) == 2 * 14 and calls_of(report) == ({"forward": 2, "loss": 2}, {})
    assert ours <= 1.1 * theirs
