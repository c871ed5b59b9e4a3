"""Layers that change what they gave a norm in place afterwards train as unpatched; all others keep no copy."""

from __future__ import annotations

import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import npu_patch
from npu_patch.outcome import Report
from tests.gradients import relative_error
from tests.own_layers import own_modeling
from tests.tiny_models import FAMILIES, tiny, tiny_batch

WIDTH = 16


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        n = x.float()
        n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * n.to(x.dtype)


class GatedRMSNorm(RMSNorm):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        n = x.float()
        n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + self.eps)
        n = self.weight * n.to(x.dtype)
        return (n * nn.functional.silu(gate.float())).to(x.dtype)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gated = GatedRMSNorm(WIDTH)
        self.early = False


class AddsToIt(Layer):
    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        h += 3 * self.mlp(self.norm(h))
        return h


class AddsByAMethod(Layer):
    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        return h.add_(self.mlp(self.norm(x=h)), alpha=3)


class AddsToAViewOfAnother(Layer):
    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        residual = h.view(-1, WIDTH)
        h = self.norm(h)
        residual += 3 * self.mlp(h).view_as(residual)
        return residual.view_as(h)


class WritesRows(Layer):
    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        y = self.mlp(self.norm(h))
        h[:, 1:] = 3 * y[:, 1:]
        return h


class ChangesInALoop(Layer):
    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        for scale in (3.0, 0.5):
            y = self.norm(h)
            h.mul_(scale)
            h += self.mlp(y)
        return h


class ChangesOnAnotherWay(Layer):
    """Which the first batch does not go."""

    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        y = self.mlp(self.norm(h))
        if self.early:
            h[:, 0] += 3 * y[:, 0]
            return h
        return h + y


class ChangesItsGate(Layer):
    def forward(self, h: Tensor) -> Tensor:
        gate = self.mlp(h) * 1
        y = self.gated(h * 2, gate)
        gate *= 3
        return y + gate


class Inner(Layer):
    def forward(self, h: Tensor) -> Tensor:
        return self.mlp(self.norm(h))


class AddsToWhatAnInnerLayerNormalizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        h += 3 * self.inner(h)
        return h


class InnerThatReturnsItToo(Layer):
    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h * 1
        return self.mlp(self.norm(h)), h


class AddsToWhatAnInnerLayerReturns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = InnerThatReturnsItToo()

    def forward(self, h: Tensor) -> Tensor:
        y, residual = self.inner(h)
        residual += 3 * y
        return residual


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return x


class GivesItToALayerThatChangesIt(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.doubles = Doubles()

    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        y = self.norm(h)
        return self.doubles(h) + self.mlp(y)


class GivesItToAnActivationThatChangesIt(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        y = self.norm(h)
        return self.act(h) + self.mlp(y)


def halves(x: Tensor) -> None:
    x /= 2


class GivesItToAFunctionThatChangesIt(Layer):
    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        y = self.norm(h)
        halves(h)
        return h + self.mlp(y)


class ChangesItInAClosure(Layer):
    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        y = self.norm(h)

        def change() -> None:
            h.mul_(3)

        change()
        return h + self.mlp(y)


CHANGE_IT = (
    AddsToIt,
    AddsByAMethod,
    AddsToAViewOfAnother,
    WritesRows,
    ChangesInALoop,
    ChangesOnAnotherWay,
    ChangesItsGate,
    AddsToWhatAnInnerLayerNormalizes,
    AddsToWhatAnInnerLayerReturns,
    GivesItToALayerThatChangesIt,
    GivesItToAnActivationThatChangesIt,
    GivesItToAFunctionThatChangesIt,
    ChangesItInAClosure,
)


class Usual(Layer):
    def forward(self, h: Tensor) -> Tensor:
        residual = h
        h = self.norm(h)
        h = self.mlp(h)
        return residual + h


class ScalesTheSum(Layer):
    """As gemma4."""

    def forward(self, h: Tensor) -> Tensor:
        residual = h
        h = self.mlp(self.norm(h))
        h = residual + h
        h *= 0.5
        return h


class AddsToTheBranch(Layer):
    def forward(self, h: Tensor) -> Tensor:
        residual = h
        h = self.norm(h)
        h *= 2
        h = self.mlp(h)
        h += residual
        return h


class ChangesBefore(Layer):
    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        h *= 3
        return h + self.mlp(self.norm(h))


class ChangesOnTheWayWithoutANorm(Layer):
    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        if self.early:
            h *= 3
        else:
            h = h + self.mlp(self.norm(h))
        return h


class ChangesACopy(Layer):
    def forward(self, h: Tensor) -> Tensor:
        copied = h.clone()
        y = self.norm(h)
        copied += self.mlp(y)
        return copied


class LoopsOverSums(Layer):
    def forward(self, h: Tensor) -> Tensor:
        for _ in range(2):
            h = h + self.mlp(self.norm(h))
            h *= 0.5
        return h


class Collects(Layer):
    def forward(self, h: Tensor) -> Tensor:
        collected = ()
        for _ in range(2):
            collected += (h,)
            h = h + self.mlp(self.norm(h))
        return sum(collected)


LEAVE_IT = (
    Usual,
    ScalesTheSum,
    AddsToTheBranch,
    ChangesBefore,
    ChangesOnTheWayWithoutANorm,
    ChangesACopy,
    LoopsOverSums,
    Collects,
)
CHECKPOINTING = {"kept": None, "checkpointed": False, "reentrant": True}


def kept_copies(report: Report) -> list[str]:
    return [each.calls.declined["the input itself"] for each in report if "the input itself" in each.calls.declined]


def own(cls: type[nn.Module], npu: torch.device, lora: bool = False, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nn.ModuleDict({"first": cls(), "second": cls()})
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["mlp"], init_lora_weights=False))
    return model.to(npu, dtype)


def gradients(model: nn.Module, way: str = "kept") -> dict[str, Tensor]:
    device, dtype = next((each.device, each.dtype) for each in model.parameters())
    leaf = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
    model.zero_grad(set_to_none=True)
    h = leaf
    for name, layer in model.named_modules():
        if name.endswith(("first", "second")):
            reentrant = CHECKPOINTING[way]
            h = layer(h) if reentrant is None else checkpoint(layer, h, use_reentrant=reentrant)
    h.float().square().sum().backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {name: each.float().cpu() for name, each in {"h": leaf.grad, **found}.items()}


def near(found: dict[str, Tensor], expected: dict[str, Tensor], by: float = 2e-2) -> bool:
    assert found.keys() == expected.keys()
    return all(relative_error(found[name], expected[name]) < by for name in expected)


@pytest.mark.parametrize("way", CHECKPOINTING)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("cls", CHANGE_IT, ids=lambda cls: cls.__name__)
def test_what_is_changed_in_place_later_is_kept(cls: type[nn.Module], lora: bool, way: str, npu: torch.device) -> None:
    model = own(cls, npu, lora)
    expected = gradients(model, way)
    with npu_patch.applied(model) as report:
        found = gradients(model, way)
        assert kept_copies(report)
        for each in model.modules():
            each.early = True
        found_early = gradients(model, way)
    assert near(found, expected)
    assert near(found_early, gradients(model, way))


@pytest.mark.parametrize("way", CHECKPOINTING)
@pytest.mark.parametrize("cls", LEAVE_IT, ids=lambda cls: cls.__name__)
def test_what_is_left_as_it_is_is_not_copied(cls: type[nn.Module], way: str, npu: torch.device) -> None:
    model = own(cls, npu)
    expected = gradients(model, way)
    with npu_patch.applied(model) as report:
        found = gradients(model, way)
    assert kept_copies(report) == []
    assert near(found, expected)


def test_in_float32_nothing_is_copied_and_what_raised_raises(npu: torch.device) -> None:
    """There the original keeps its input too."""
    model = own(AddsToIt, npu, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model)
    with npu_patch.applied(model) as report, pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model)
    assert kept_copies(report) == []


def test_without_a_backward_nothing_is_copied(npu: torch.device) -> None:
    model, h = own(AddsToIt, npu), torch.randn(2, 5, WIDTH).to(npu, torch.bfloat16)
    with npu_patch.applied(model) as report:
        with torch.no_grad():
            model["first"](h)
        model.requires_grad_(False)
        model["first"](h)
    assert kept_copies(report) == []


def test_code_without_a_source_may_change_anything(npu: torch.device) -> None:
    modeling: types.ModuleType = own_modeling(("h = h * 1", "h += self.mlp(self.norm(h))", "return h"))
    layer = modeling.Layer(types.SimpleNamespace(hidden_size=WIDTH, kind="", steps=1)).to(npu, torch.bfloat16)
    model = nn.ModuleDict({"first": layer})
    expected = gradients(model)
    with npu_patch.applied(model) as report:
        found = gradients(model)
    assert ["cannot be read" in reason for reason in kept_copies(report)] == [True]
    assert near(found, expected)


@pytest.mark.parametrize("order", ["apply first", "a second model", "apply twice"])
def test_whenever_it_is_applied(order: str, npu: torch.device) -> None:
    expected = gradients(own(AddsToIt, npu))
    other = own(Usual, npu)
    with npu_patch.applied(other if order == "a second model" else own(AddsToIt, npu)):
        if order == "a second model":
            gradients(other)
        model = own(AddsToIt, npu)
        if order == "apply twice":
            npu_patch.apply(model)
        found = gradients(model)
    assert near(found, expected)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_keep_no_copy(family: str, checkpointed: bool, npu: torch.device) -> None:
    model = tiny(family).to(npu, torch.bfloat16).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with npu_patch.applied(model) as report:
        model(**{name: each.to(npu) for name, each in tiny_batch().items()}).loss.backward()
        assert any(each.calls.ran for each in report if each.patch == "rms_norm")
    assert kept_copies(report) == []
