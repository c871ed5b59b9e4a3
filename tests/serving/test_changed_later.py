"""Layers that change what they gave a norm in place afterwards train as unpatched; all others keep no copy."""

from __future__ import annotations

import ast
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import npu_patch
from npu_patch.ops.rms_norm import PLAIN_VARIANTS
from npu_patch.reporting.report import Report
from npu_patch.serving import changed_later
from npu_patch.serving.in_place_flow import Source, what_becomes
from npu_patch.waiting.heads import Abandoned, DeferredHeads
from tests.support.gradients import relative_error
from tests.support.own_layers import own_modeling
from tests.support.tiny_models import FAMILIES, tiny, tiny_batch

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


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


class AddsToItTheSecondTime(Layer):
    """The same call of the norm, from two places outside."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = Branch()

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.branch(h)
        h += self.branch(h)
        return h.tanh()


class GivesItToASequenceThatChangesIt(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        normed = self.norm(h)
        return normed * self.after(h)


class ActivatesItByPosition(Layer):
    def forward(self, h: Tensor) -> Tensor:
        h = h * 1
        normed = self.norm(h)
        nn.functional.relu(h, True)
        return (self.mlp(h) + normed).tanh()


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
    AddsToItTheSecondTime,
    GivesItToASequenceThatChangesIt,
    ActivatesItByPosition,
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


class MultipliesItsHeads(Layer):
    num_key_value_groups = 1
    is_causal = True

    def attended(self, h: Tensor) -> Tensor:
        heads = self.mlp(h).unflatten(-1, (2, -1)).transpose(1, 2)
        y, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](self, heads, heads * 2, heads * 3, None, scaling=0.5)
        return y

    def forward(self, h: Tensor) -> Tensor:
        y = self.attended(h)
        y = y * 3
        return y.flatten(2)


class ScalesItsHeads(MultipliesItsHeads):
    def forward(self, h: Tensor) -> Tensor:
        y = self.attended(h)
        y *= 3
        return y.flatten(2)


class Mixer(nn.Module):
    def __init__(self, config: object) -> None:
        super().__init__()
        self.proj = nn.Linear(config.size, config.size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class AddsToTheSum(nn.Module):
    def __init__(self, config: object) -> None:
        super().__init__()
        self.mixer, self.mlp, self.norm = Mixer(config), Mixer(config), RMSNorm(config.size)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.mixer(h)
        h += 3 * self.mlp(self.norm(h))
        return h


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


@pytest.mark.parametrize("way", CHECKPOINTING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("changes", [False, True])
def test_attention_whose_result_is_changed_in_place(
    changes: bool, dtype: torch.dtype, way: str, npu: torch.device
) -> None:
    """The operator keeps its result for the backward; what torch's attention returns here may be changed."""
    model = own(ScalesItsHeads if changes else MultipliesItsHeads, npu, dtype=dtype)
    expected = gradients(model, way)
    with npu_patch.applied(model) as report:
        found = gradients(model, way)
        (attention,) = (each for each in report if each.site == "AttentionInterface['sdpa']")
        assert attention.calls.ran
        assert ("the result itself" in attention.calls.declined) == changes
    assert near(found, expected, 2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_heads_that_wait_for_their_rotation_notice_a_change_of_their_input() -> None:
    x = torch.randn(2, 5, 3, WIDTH)
    waiting = DeferredHeads(RMSNorm(WIDTH), x, None, 1e-6, PLAIN_VARIANTS[4])
    waiting.transpose(1, 2)
    x.mul_(2)
    with pytest.raises(Abandoned, match="changed in place"):
        waiting.transpose(1, 2)


@pytest.mark.parametrize("way", ["kept", "checkpointed"])
def test_a_sum_that_is_changed_in_place_is_not_put_off(way: str, npu: torch.device, two_cores: None) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": AddsToTheSum(types.SimpleNamespace(size=WIDTH))}).to(npu, torch.bfloat16)
    expected = gradients(model, way)
    with npu_patch.applied(model, triton=True) as report:
        found = gradients(model, way)
    assert near(found, expected)
    assert not any(each.calls.ran for each in report if each.patch == "add_rms_norm")


def function(body: str) -> Source:
    lines = "\n    ".join(body.split("; "))
    return Source(ast.parse(f"def forward(self, h, other, *rest, out=None):\n    {lines}").body[0], 1, 0)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("y = self.norm(h); h += y", 3),
        ("y = self.norm(h); h = h + y; h += y", None),
        ("y = self.norm(h); h -= y", 3),
        ("y = self.norm(h); torch.relu_(h)", 3),
        ("y = self.norm(h); torch.add(other, y, out=h)", 3),
        ("y = self.norm(h); F.relu(h, inplace=True)", 3),
        ("y = self.norm(h); F.relu(h, inplace=False)", None),
        ("y = self.norm(h); h.data = y", 3),
        ("y = self.norm(h); h.requires_grad_()", None),
        ("y = self.norm(h); h.T[0].zero_()", 3),
        ("y = self.norm(h); a, b = h.chunk(2, -1); b *= 2", 4),
        ("y = self.norm(h); first, *more = self.split(h); more[0].zero_()", 4),
        ("y = self.norm(h); held = [h]; held[0].zero_()", 4),
        ("y = self.norm(h); held = []; held.append(h); held[0].zero_()", 5),
        ("y = self.norm(h); self.last = h; self.last.zero_()", 4),
        ("y = self.norm(h); h = self.dropout(h); h += y", 4),
        ("y = self.norm(h); g = h if self.flag else other; g += y", 4),
        ("y = self.norm(h); (g := h).zero_()", 3),
        ("y = self.norm(h[:, 1:]); h += y", 3),
        ("y = self.norm(h[~other]); h[~other] += y", None),
        ("y = self.norm(h + other); h += y", None),
        ("y = self.norm(h.clone()); h += y", None),
        ("other += h; y = self.norm(h)", None),
        ("other = self.norm(h); other += h", None),
        ("shape = h.shape; y = self.norm(h); y = y.view(shape); y += 1", None),
        ("index = 0; y = self.norm(h); index += 1", None),
    ],
)
def test_the_line_that_changes_it(body: str, line: int | None) -> None:
    source = function(body)
    (call,) = (
        each for each in ast.walk(source.tree) if isinstance(each, ast.Call) and "norm" in ast.unparse(each.func)
    )
    assert what_becomes(source, call, (0,), (), False, lambda called: None).line == line


def test_a_call_costs_no_second_look(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = own(AddsToIt, npu)
    with npu_patch.applied(model):
        expected = gradients(model)
        monkeypatch.setattr(changed_later, "what_becomes", None)
        monkeypatch.setattr(changed_later, "source_of", None)
        found = gradients(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
