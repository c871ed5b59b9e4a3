"""Adapted layers of one input: which are computed together, that nobody can tell, and what waits for whom."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as AdaptedLinear
from torch import Tensor, nn

import npu_patch
from npu_patch import simulator
from npu_patch.patches.lora.groups import Groups
from npu_patch.probe.shared_input import read_shared_inputs
from tests.support.gradients import relative_error
from tests.support.lora_models import PRECISIONS, a_step, adapted_layer, adapted_model, fell_through, ran

ALONE = {"fused_ops": False, "moe_patch": False, "fla": False, "loss": False}
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma3", "glm4_moe", "qwen3_5")


class Three(nn.Module):
    """Three layers, which a subclass calls."""

    def __init__(self, dropout: float = 0.0, precision: str = "float32") -> None:
        super().__init__()
        for index, name in enumerate(("first", "second", "third")):
            setattr(self, name, adapted_layer(dropout, PRECISIONS[precision], seed=index))


def three(how: Callable[..., Any], dropout: float = 0.0, precision: str = "float32") -> Any:
    return type("Calling", (Three,), {"forward": how})(dropout, precision)


def one_after_the_other(self: Any, x: Tensor) -> list[Tensor]:
    return [self.first(x), self.second(x), self.third(x)]


def groups_of(model: nn.Module) -> set[tuple[str, ...]]:
    found = set()
    for parent in model.modules():
        adapted = {name: each for name, each in parent._modules.items() if isinstance(each, AdaptedLinear)}
        if adapted:
            widths = tuple((name, each.in_features, each.out_features) for name, each in adapted.items())
            cls = type(parent)
            found.update(read_shared_inputs(cls, cls.forward, vars(parent), parent._modules, widths))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_projections_of_attention_and_of_feed_forward_layers_are_found(family: str) -> None:
    model = adapted_model(family)
    before = torch.get_rng_state()
    found = groups_of(model)
    assert torch.equal(before, torch.get_rng_state())
    assert ("q_proj", "k_proj", "v_proj") in found
    assert "moe" in family or ("gate_proj", "up_proj") in found


def and_then(self: Any, x: Tensor) -> list[Tensor]:
    return [self.first(x), self.second(x + 1), self.third(x)]


def of_a_view(self: Any, x: Tensor) -> list[Tensor]:
    return [self.first(x), self.second(x.view(x.shape)), self.third(x)]


def changed_between(self: Any, x: Tensor) -> list[Tensor]:
    first = self.first(x)
    x.mul_(2)
    return [first, self.second(x), self.third(x)]


def twice(self: Any, x: Tensor) -> list[Tensor]:
    return [self.first(x), self.first(x), self.second(x), self.second(x)]


def in_a_chain(self: Any, x: Tensor) -> list[Tensor]:
    return [self.third(self.second(self.first(x)[..., :48])[..., :48])]


HOW = {
    "one after the other": (one_after_the_other, {("first", "second", "third")}),
    "another input between": (and_then, set()),
    "a view between": (of_a_view, set()),
    "changed between": (changed_between, {("second", "third")}),
    "each twice": (twice, set()),
    "in a chain": (in_a_chain, set()),
}


@pytest.mark.parametrize("how", HOW)
def test_what_is_found_and_computed(how: str, npu: torch.device) -> None:
    forward, expected = HOW[how]
    layer = three(forward, 0.3).to(npu).train()
    x = torch.randn(2, 5, 48, device=npu)

    def step() -> list[Tensor]:
        torch.manual_seed(0)
        layer.zero_grad()
        given = x.clone().requires_grad_()
        results = layer(given * 1)
        sum(each.sin().sum() for each in results).backward()
        grads = [each.grad for each in layer.parameters() if each.grad is not None]
        return [*results, given.grad, *grads]

    widths = tuple((name, 48, 72) for name in ("first", "second", "third"))
    found = read_shared_inputs(type(layer), forward, {}, layer._modules, widths)
    assert set(found) == expected
    own = step()
    with npu_patch.applied(**ALONE) as report:
        patched = step()
    assert not fell_through(report)
    assert len(own) == len(patched)
    assert max(relative_error(*pair) for pair in zip(patched, own, strict=True)) < 2e-6


ODD: list[Callable[..., Any]] = []  # what a layer does, if not what was read of it


@pytest.fixture(autouse=True)
def nothing_odd() -> Iterator[None]:
    yield
    ODD.clear()


def as_read_or_odd(self: Any, x: Tensor) -> list[Tensor]:
    return ODD[0](self, x) if ODD else one_after_the_other(self, x)


def other_input(self: Any, x: Tensor) -> list[Tensor]:
    return [self.first(x), self.second(x + 1), self.third(x)]


def weight_between(self: Any, x: Tensor) -> list[Tensor]:
    first = self.first(x)
    with torch.no_grad():
        self.second.lora_A["default"].weight.mul_(3)
    second = self.second(x)
    self.third.scale_layer(2.0)
    return [first, second, self.third(x)]


def input_between(self: Any, x: Tensor) -> list[Tensor]:
    first = self.first(x)
    x.mul_(2)
    return [first, self.second(x), self.third(x)]


def without_gradients(self: Any, x: Tensor) -> list[Tensor]:
    first = self.first(x)
    with torch.no_grad():
        second = self.second(x)
    return [first, second, self.third(x)]


def only_the_first(self: Any, x: Tensor) -> list[Tensor]:
    return [self.first(x)]


def disabled_between(self: Any, x: Tensor) -> list[Tensor]:
    first = self.first(x)
    self.second.enable_adapters(False)
    return [first, self.second(x), self.third(x)]


@pytest.mark.parametrize(
    "odd",
    [other_input, weight_between, input_between, without_gradients, only_the_first, disabled_between],
    ids=lambda odd: odd.__name__,
)
def test_whoever_is_asked_otherwise_computes_what_it_is_asked(odd: Callable[..., Any], npu: torch.device) -> None:
    """Nothing that waits is handed out for another call."""
    layer = three(as_read_or_odd).to(npu)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 5, 48, device=npu)
    ODD.append(odd)
    own = twin(x.clone())
    ODD.clear()
    with npu_patch.applied(**ALONE):
        assert len({each.grad_fn for each in layer(x)}) == 1
        ODD.append(odd)
        found = layer(x.clone())
    for one, other in zip(found, own, strict=True):
        assert relative_error(one, other) < 1e-6
        assert one.requires_grad == other.requires_grad


@pytest.mark.parametrize(
    "listens", ["pre-hook", "forward of its own", "hook", "another dropout", "adapters of bfloat16"]
)
def test_a_layer_that_is_different_computes_for_itself_or_as_it_does(listens: str, npu: torch.device) -> None:
    layer = three(one_after_the_other).to(npu)
    second = layer.second
    if listens == "pre-hook":
        second.register_forward_pre_hook(lambda module, given: (given[0] * 2,))
    elif listens == "hook":
        second.register_forward_hook(lambda module, given, result: result * 2)
    elif listens == "forward of its own":
        before = second.forward
        second.forward = lambda given: before(given) * 2
    elif listens == "another dropout":
        second.lora_dropout["default"] = nn.Dropout(0.5)
    else:
        second.lora_A.bfloat16()
        second.lora_B.bfloat16()
    x = torch.randn(2, 5, 48, device=npu)
    torch.manual_seed(0)
    own = layer(x)
    with npu_patch.applied(**ALONE):
        torch.manual_seed(0)
        found = layer(x)
    bar = 1e-2 if "bfloat16" in listens else 1e-6
    assert max(relative_error(*pair) for pair in zip(found, own, strict=True)) < bar


@pytest.mark.parametrize("name", PRECISIONS)
def test_together_the_bits_are_those_of_each_alone(
    name: str, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision = PRECISIONS[name]
    layer = three(one_after_the_other, 0.3, name).to(npu)
    x = torch.randn(2, 5, 48, device=npu, dtype=precision.model)

    def forward() -> list[Tensor]:
        torch.manual_seed(0)
        with precision.around(npu):
            return layer(x)

    with npu_patch.applied(**ALONE):
        together = forward()
        assert len({each.grad_fn for each in together}) == 1
        monkeypatch.setattr(Groups, "after", lambda self, layer: iter(()))
        alone = forward()
        assert len({each.grad_fn for each in alone}) == 3
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


def test_results_that_nobody_takes_go_with_the_next_group(npu: torch.device) -> None:
    layer = three(as_read_or_odd).to(npu)
    x = torch.randn(2, 5, 48, device=npu)
    with npu_patch.applied(**ALONE):
        layer(x)
        ODD.append(only_the_first)
        kept = weakref.ref(x)
        layer(x)
        del x
        ODD.clear()
        layer(torch.randn(2, 5, 48, device=npu))
        gc.collect()
        assert kept() is None


def test_a_parent_that_is_gone_is_not_asked_for(npu: torch.device) -> None:
    layer = three(one_after_the_other).to(npu)
    x = torch.randn(2, 5, 48, device=npu)
    with npu_patch.applied(**ALONE) as report:
        layer(x)
        first = layer.first
        del layer
        gc.collect()
        own = AdaptedLinear.forward.__wrapped__(first, x)
        assert relative_error(first(x), own) < 1e-6
    assert ran(report) == 4


def test_what_a_group_saves_in_launches(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of the input's gradients, casts of adapters, and scaling their gradients."""
    if not simulator.is_active():
        pytest.skip("launches are counted on the simulated NPU")
    precision = PRECISIONS["bfloat16, float32 adapters, autocast"]
    model = adapted_model("qwen3", 0.05, precision).to(npu)

    def launches() -> int:
        with simulator.count() as counted:
            a_step(model, precision)
        return counted.launches

    with npu_patch.applied(model):
        a_step(model, precision)
        together = launches()
        monkeypatch.setattr(Groups, "after", lambda self, layer: iter(()))
        alone = launches()
    # Of each of two layers: the casts of three adapters and of two are two launches, not six and four; scaling their
    # gradients, and casting them back, is two launches for each group; and of what has a gradient, two sums and one.
    casts, scaled, sums = 2 * (4 + 2), 2 * (4 + 2), 2 * (2 + 1) - 2
    assert alone - together == casts + scaled + sums


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, states: Tensor | None = None) -> Tensor:
        states = x if states is None else states
        return self.q_proj(x) + self.k_proj(states) * self.v_proj(states)


def test_what_cross_attention_is_given_is_computed_together_with_its_query_once_at_most(npu: torch.device) -> None:
    config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(CrossAttention(), config).train().to(npu)
    x, states = torch.randn(2, 3, 16, device=npu), torch.randn(2, 3, 16, device=npu)
    drawn = []
    with npu_patch.applied(**ALONE):
        for _ in range(3):
            with simulator.count() as counted:
                model(x, states)
            drawn.append(sum(launches for name, (launches, _) in counted.by_op.items() if "dropout" in name))
    assert drawn[1:] == [3, 3]
