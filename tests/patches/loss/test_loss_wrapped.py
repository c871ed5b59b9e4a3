"""Models that torch's wrappers for several devices hold: each hooks or copies what a forward returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import npu_patch
from npu_patch.ops import chunked_loss
from npu_patch.waiting.origins import ReadTooLate
from tests.patches.loss.test_loss import VOCABULARY, calls_of, model_of
from tests.support.gradients import relative_error
from tests.support.tiny_models import tiny_batch

Wrap = Callable[[torch.nn.Module], torch.nn.Module]


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(chunked_loss, "ELEMENTS", 16 * VOCABULARY)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    npu_patch.restore()


def sharded(model: torch.nn.Module) -> torch.nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def head_apart(model: torch.nn.Module) -> torch.nn.Module:
    fully_shard(model.lm_head)
    return sharded(model)


def head_kept(model: torch.nn.Module) -> torch.nn.Module:
    """As transformers and accelerate shard models."""
    fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
    return sharded(model)


WRAPPED: dict[str, tuple[Wrap, str]] = {
    "DDP": (DistributedDataParallel, "cpu"),
    "DDP, unused": (lambda model: DistributedDataParallel(model, find_unused_parameters=True), "cpu"),
    "DDP, static": (lambda model: DistributedDataParallel(model, static_graph=True), "cpu"),
    "FSDP": (lambda model: FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")), "cpu"),
    "fully_shard": (sharded, "npu"),  # which takes the accelerator that there is
    "fully_shard, the head apart": (head_apart, "npu"),
    "fully_shard, the head apart and kept": (head_kept, "npu"),
}


@pytest.mark.parametrize("name", ["qwen3", "gemma2, soft cap"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_loss_and_gradients_are_the_original_ones(wrapped: str, name: str, npu: torch.device) -> None:
    wrap, device = WRAPPED[wrapped]

    def step() -> dict[str, Tensor]:
        model = wrap(model_of(name))
        found = model(**tiny_batch())
        found.loss.backward()
        grads = {each: parameter.grad for each, parameter in model.named_parameters() if parameter.grad is not None}
        full = {each: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for each, grad in grads.items()}
        return {"loss": found.loss.detach(), **full}

    expected = step()
    with npu_patch.applied(device=device, fused_ops=False, moe_patch=False, fla=False) as report:
        found = step()
    ran, reasons = calls_of(report)
    if wrapped == "fully_shard, the head apart":
        assert ran.total() == 0 and reasons["hooks on the head"] == 1
    else:
        assert +ran == {"forward": 1, "loss": 1} and not reasons
    assert found.keys() == expected.keys()
    for each in expected:
        assert relative_error(found[each], expected[each]) < 1e-6, each


def test_logits_are_there_until_the_weights_of_the_head_are_given_back(npu: torch.device) -> None:
    """fully_shard keeps the root's weights from the forward to the backward."""
    model, batch = sharded(model_of("qwen3")), tiny_batch()
    expected = model(**batch).logits
    with npu_patch.applied(device="npu", fused_ops=False, moe_patch=False, fla=False):
        early, late = model(**batch), model(**batch)
        assert torch.equal(early.logits.argmax(-1), expected.argmax(-1))
        late.loss.backward()
        assert torch.equal(early.logits, expected)
        with pytest.raises(ReadTooLate, match="memory of the weight was given back"):
            late.logits.argmax(-1)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_that_is_kept_hears_of_each_backward(frozen: bool, npu: torch.device) -> None:
    """Its norm's weights are gathered again for the second one."""

    def steps() -> list[Tensor]:
        model = model_of("qwen3")
        model.lm_head.requires_grad_(not frozen)
        model = head_kept(model)
        losses = [model(**tiny_batch(seed=seed)).loss for seed in range(2)]
        for loss in losses:
            loss.backward()
        return [parameter.grad.full_tensor() for parameter in model.parameters() if parameter.grad is not None]

    expected = steps()
    with npu_patch.applied(device="npu", fused_ops=False, moe_patch=False, fla=False) as report:
        found = steps()
    assert +calls_of(report)[0] == {"forward": 2, "loss": 2}
    assert len(found) == len(expected)
    assert max(relative_error(*pair) for pair in zip(found, expected, strict=True)) < 1e-6


def test_a_kept_head_that_somebody_else_hooks_is_left_alone(npu: torch.device) -> None:
    model = model_of("qwen3")
    heard = []
    model.lm_head.register_forward_hook(lambda *_: heard.append(1))
    model = head_kept(model)
    with npu_patch.applied(device="npu", fused_ops=False, moe_patch=False, fla=False) as report:
        model(**tiny_batch()).loss.backward()
    ran, reasons = calls_of(report)
    assert heard and ran.total() == 0 and reasons["hooks on the head"] == 1
