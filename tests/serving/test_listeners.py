"""Whoever listens is heard: to a submodule that a replacement does not call, as often as unpatched and with the same
effect; and to one that it does call, with the replacement in effect."""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as of_all
from torch.nn.utils import parametrize

import npu_patch
from npu_patch.patches.gated_delta import inline_convolution as gated_delta_door
from npu_patch.serving.listeners import listener, listener_among
from tests.patches.experts.test_looped import SoftmaxBlock, results
from tests.patches.gated_delta.test_gated_delta_net import InlineLayer
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.needs_triton import needs_triton
from tests.support.parity import apart
from tests.support.tiny_models import tiny, tiny_batch

Heard = Counter[str]
Listen = Callable[[nn.Module, Heard], Callable[[], None]]  # what it returns ends it


def scaled(tensors: Any) -> Any:
    return (
        tuple(None if each is None else each * 0.5 for each in tensors) if isinstance(tensors, tuple) else tensors * 0.5
    )


def hook(register: str, place: int, **options: Any) -> Listen:
    """`place`: of what is scaled among the hook's arguments."""

    def listen(module: nn.Module, heard: Heard) -> Callable[[], None]:
        def hear(*given: Any) -> Any:
            heard[type(given[0]).__name__] += 1
            return scaled(given[place])

        return getattr(module, register)(hear, **options).remove

    return listen


def hook_on_all(register: str, place: int) -> Listen:
    """Scales what belongs to the one module."""

    def listen(module: nn.Module, heard: Heard) -> Callable[[], None]:
        def hear(*given: Any) -> Any:
            heard[type(given[0]).__name__] += 1
            return scaled(given[place]) if given[0] is module else None

        return getattr(of_all, register)(hear).remove

    return listen


def own_forward(module: nn.Module, heard: Heard) -> Callable[[], None]:
    """As accelerate and peft bind one on the instance."""
    before = module.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        heard["forward"] += 1
        return scaled(before(*args, **kwargs))

    module.forward = forward
    return lambda: vars(module).pop("forward")


def another_class(module: nn.Module, heard: Heard) -> Callable[[], None]:
    """A subclass given to the instance; heard on the model's device, as probes are no calls of the model."""
    before = type(module)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        heard["class"] += x.device.type == "npu"
        return scaled(before.forward(self, x))

    module.__class__ = type(before.__name__, (before,), {"forward": forward})
    return lambda: setattr(module, "__class__", before)


LISTENERS: dict[str, Listen] = {
    "forward hook": hook("register_forward_hook", 2),
    "forward hook, always called": hook("register_forward_hook", 2, always_call=True),
    "forward pre-hook": hook("register_forward_pre_hook", 1),
    "backward hook": hook("register_full_backward_hook", 1),
    "backward pre-hook": hook("register_full_backward_pre_hook", 1),
    "old backward hook": hook("register_backward_hook", 1),
    "forward hook on all": hook_on_all("register_module_forward_hook", 2),
    "forward pre-hook on all": hook_on_all("register_module_forward_pre_hook", 1),
    "backward hook on all": hook_on_all("register_module_full_backward_hook", 1),
    "backward pre-hook on all": hook_on_all("register_module_full_backward_pre_hook", 1),
    "forward of its own": own_forward,
    "class of its own": another_class,
}


@contextlib.contextmanager
def listening(listen: Listen, module: nn.Module) -> Iterator[Heard]:
    heard: Heard = Counter()
    end = listen(module, heard)
    try:
        yield heard
    finally:
        end()


def assert_heard_as_unpatched(family: str, path: str, listen: Listen, npu: torch.device, **options: Any) -> Heard:
    """The same hearings, loss and gradients; and what was heard made a difference."""
    model = tiny(family, num_hidden_layers=1, layer_types=None).to(npu)
    batch = tiny_batch(length=5)
    module = model.get_submodule(path)
    undisturbed = loss_and_gradients(model, batch)
    with listening(listen, module) as expected:
        wanted = loss_and_gradients(model, batch)
    assert any(not torch.equal(wanted[name], undisturbed[name]) for name in wanted)
    with npu_patch.applied(model, **options) as report:
        loss_and_gradients(model, batch)  # what is served once is asked again
        ran = {outcome.patch for outcome in report.patched if outcome.calls.ran}
        with listening(listen, module) as heard:
            found = loss_and_gradients(model, batch)
        reasons = {reason for outcome in report.patched for reason in outcome.calls.fell_through}
    assert expected and heard == expected
    assert {name: e for name in wanted if (e := relative_error(found[name], wanted[name])) > 1e-5} == {}
    return Counter({"ran": len(ran), "reasons": len(reasons)})


@pytest.mark.parametrize("kind", LISTENERS)
@pytest.mark.parametrize(
    ("family", "path"), [("qwen3", "model.layers.0.mlp.act_fn"), ("qwen3_moe", "model.layers.0.mlp.experts.act_fn")]
)
def test_an_activation_within_a_fused_span_is_heard(family: str, path: str, kind: str, npu: torch.device) -> None:
    assert_heard_as_unpatched(family, path, LISTENERS[kind], npu)


@pytest.mark.parametrize("kind", ["forward hook", "forward pre-hook", "backward hook", "forward of its own"])
@pytest.mark.parametrize("part", ["mlp.gate_proj", "mlp.down_proj", "mlp", "input_layernorm", "self_attn.q_norm"])
def test_a_part_that_is_called_is_heard_and_stays_fused(part: str, kind: str, npu: torch.device) -> None:
    seen = assert_heard_as_unpatched("qwen3", f"model.layers.0.{part}", LISTENERS[kind], npu)
    assert seen["ran"] > 3
    if kind != "forward of its own":
        assert seen["reasons"] == 0


@needs_triton
@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    "kind",
    [
        "forward hook",
        "forward pre-hook",
        "backward hook",
        "backward hook on all",
        "forward of its own",
        "class of its own",
    ],
)
@pytest.mark.parametrize("part", ["self_attn.q_norm", "self_attn.q_proj", "post_attention_layernorm"])
def test_parts_of_deferred_spans_are_heard(part: str, kind: str, npu: torch.device) -> None:
    """Norms that are put off until the rotation or the residual's sum, and what runs before them."""
    assert_heard_as_unpatched("qwen3", f"model.layers.0.{part}", LISTENERS[kind], npu, triton=True)


def test_listeners_to_all_modules_hear_the_activation_that_a_gated_norm_makes(npu: torch.device) -> None:
    model = tiny("qwen3_5").to(npu)
    batch = tiny_batch(length=5)
    hearings = []
    for patched in (False, True):
        with (
            npu_patch.applied(model, patch=patched),
            listening(hook_on_all("register_module_forward_hook", 2), model.model.norm) as heard,
        ):
            loss_and_gradients(model, batch)
        hearings.append(heard)
    assert hearings[0] and hearings[0] == hearings[1]


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
def test_who_stops_listening_is_no_longer_asked_for(grad: bool, npu: torch.device) -> None:
    model = tiny("qwen3", num_hidden_layers=1).to(npu)
    ids = tiny_batch(length=5)["input_ids"].to(npu)
    with npu_patch.applied(model) as report, torch.set_grad_enabled(grad):
        (calls,) = (outcome.calls for outcome in report.patched if outcome.patch == "swiglu")
        before = model(input_ids=ids).logits
        with listening(LISTENERS["forward hook"], model.model.layers[0].mlp.act_fn) as heard:
            model(input_ids=ids)
        assert sum(heard.values()) == 1 and dict(calls.fell_through) == {"hooks on act_fn": 1}
        assert torch.equal(model(input_ids=ids).logits, before) and calls.ran == 2


def test_apply_calls_no_hook_of_an_activation(npu: torch.device) -> None:
    model = tiny("qwen3", num_hidden_layers=1).to(npu)
    with listening(LISTENERS["forward hook"], model.model.layers[0].mlp.act_fn) as heard, npu_patch.applied(model):
        assert not heard


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


def test_a_parametrized_norm_is_served_with_the_weight_that_it_has_now(npu: torch.device) -> None:
    model = tiny("qwen3", num_hidden_layers=1).to(npu)
    batch = tiny_batch(length=5)
    with npu_patch.applied(model):
        loss_and_gradients(model, batch)
        parametrize.register_parametrization(model.model.layers[0].input_layernorm, "weight", Halved())
        found = loss_and_gradients(model, batch)
    expected = loss_and_gradients(model, batch)
    assert found.keys() == expected.keys()
    assert max(relative_error(found[name], expected[name]) for name in expected) < 1e-5


def expert(block: SoftmaxBlock, part: str) -> nn.Module:
    return block.experts[1].get_submodule(part)


@pytest.mark.parametrize("part", ["", "act_fn", "gate_proj"])
@pytest.mark.parametrize("kind", LISTENERS)
def test_parts_of_looped_experts_are_heard(kind: str, part: str, npu: torch.device) -> None:
    torch.manual_seed(0)
    block = SoftmaxBlock().to(npu)
    with listening(LISTENERS[kind], expert(block, part)) as expected:
        wanted = results(block, npu)
    with npu_patch.applied(block, fused_ops=False):
        results(block, npu)
        with listening(LISTENERS[kind], expert(block, part)) as heard:
            found = results(block, npu)
    assert expected and heard == expected
    assert apart(found, wanted) == {}


@pytest.mark.parametrize("kind", [*LISTENERS, "weight_norm", "parametrization"])
def test_a_convolution_behind_a_door_is_heard(kind: str) -> None:
    config = types.SimpleNamespace(hidden_size=3, hidden_act="silu", linear_conv_kernel_dim=4)
    layer = InlineLayer(config, 0)
    assert gated_delta_door.why_inline(layer) is None
    if kind == "weight_norm":
        torch.nn.utils.weight_norm(layer.conv1d)
    elif kind == "parametrization":
        parametrize.register_parametrization(layer.conv1d, "weight", Halved())
    else:
        end = LISTENERS[kind](layer.conv1d, Counter())
        assert gated_delta_door.why_inline(layer) is not None
        end()
        assert gated_delta_door.why_inline(layer) is None
        return
    assert gated_delta_door.why_inline(layer) is not None


def test_what_is_asked_at_every_call_is_asked_of_each_part_below() -> None:
    layer = nn.Module()
    layer.first, layer.second = nn.SiLU(), nn.Sequential(nn.Identity(), nn.SiLU())
    layer.none = None
    assert listener_among(layer) is None and listener(torch.tanh, "tanh") is None
    layer.second[1].register_forward_hook(lambda *given: None)
    assert listener_among(layer) == "hooks on 1"
