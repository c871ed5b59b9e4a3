"""Patch embeddings of real models, whoever stands around them; what is left alone; and what `auto` takes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import npu_patch
from npu_patch import Outcome, Report
from npu_patch.applying import api as lifecycle
from npu_patch.measuring import measurer, tuning
from npu_patch.ops.patch_embedding import PATCH_EMBEDDING
from npu_patch.patches.patch import NOT_FASTER
from npu_patch.patches.vision import patch_embedding
from npu_patch.serving.signature import signature_of
from tests.support.gradients import relative_error
from tests.support.made_up_clock import made_up

PRODUCT = PATCH_EMBEDDING.implementations[0].name
SITE = "torch.nn.modules.conv.Conv3d.forward"
FORWARDS = {cls: cls.forward for cls in (nn.Conv2d, nn.Conv3d)}


def qwen2_vl() -> nn.Module:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed

    return PatchEmbed(patch_size=4, temporal_patch_size=2, in_channels=3, embed_dim=16)


def qwen3_vl() -> nn.Module:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchEmbed

    return Qwen3VLVisionPatchEmbed(Qwen3VLVisionConfig(patch_size=4, hidden_size=16))


def siglip() -> nn.Module:
    from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

    return SiglipVisionEmbeddings(SiglipVisionConfig(hidden_size=16, image_size=12, patch_size=4))


def dinov2() -> nn.Module:
    from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
    from transformers.models.dinov2.modeling_dinov2 import Dinov2PatchEmbeddings

    return Dinov2PatchEmbeddings(Dinov2Config(hidden_size=16, image_size=12, patch_size=4))


def videomae() -> nn.Module:
    from transformers.models.videomae.configuration_videomae import VideoMAEConfig
    from transformers.models.videomae.modeling_videomae import VideoMAEPatchEmbeddings

    return VideoMAEPatchEmbeddings(VideoMAEConfig(hidden_size=16, image_size=12, patch_size=4, num_frames=4))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # with the shape of its input
    "qwen2_vl": (qwen2_vl, (10, 3 * 2 * 4 * 4)),
    "qwen3_vl": (qwen3_vl, (10, 3 * 2 * 4 * 4)),
    "siglip": (siglip, (2, 3, 12, 12)),
    "dinov2": (dinov2, (2, 3, 12, 12)),
    "videomae": (videomae, (2, 4, 3, 12, 12)),
}


def pixels(shape: tuple[int, ...], device: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(device, dtype)


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output and every gradient, in float64 on the CPU."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = model(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    found = {"output": out, "input": x.grad, **gradients}
    return {name: each.detach().cpu().double() for name, each in found.items()}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], bar: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    assert max(relative_error(found[name], expected[name]) for name in found) < bar


def outcomes(report: Report) -> list[Outcome]:
    return [each for each in report.patched if each.patch == "patch_embedding"]


def ran(report: Report) -> int:
    """Calls that the product served; every call that was not declined was one."""
    found = outcomes(report)
    assert sum(each.calls.ran for each in found) == sum(each.calls.ran_by[PRODUCT] for each in found)
    return sum(each.calls.ran for each in found)


def fell_through(report: Report) -> dict[str, int]:
    return {reason: count for each in outcomes(report) for reason, count in each.calls.fell_through.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models_embed_patches_as_unpatched(name: str, dtype: torch.dtype, npu: torch.device) -> None:
    make, shape = MODELS[name]
    model, x = make().to(npu, dtype), pixels(shape, npu, dtype)
    before, parameters = results(model, x), dict(model.named_parameters())
    keys = list(model.state_dict())
    report = npu_patch.apply(model, patch_embedding=True)
    found = results(model, x)
    assert ran(report) == 1 and [each.layers for each in outcomes(report)] == [1]
    assert list(model.state_dict()) == keys
    assert all(parameter is parameters[each] for each, parameter in model.named_parameters())
    if dtype == torch.float32:
        assert_near(found, before)
    else:
        exact = results(copy.deepcopy(model).cpu().double(), x.cpu().double())
        for each in exact:
            assert relative_error(found[each], exact[each]) <= 1.1 * relative_error(before[each], exact[each]) + 2**-10
    npu_patch.restore()
    assert {cls: cls.forward for cls in FORWARDS} == FORWARDS
    again = results(model, x)
    assert all(torch.equal(again[each], before[each]) for each in before)


def test_layers_that_are_made_later_are_served_until_restored(npu: torch.device) -> None:
    report = npu_patch.apply(patch_embedding=True)
    make, shape = MODELS["qwen2_vl"]
    model, x = make().to(npu), pixels(shape, npu)
    found = results(model, x)
    assert ran(report) == 1 and {each.made for each in outcomes(report)} == {0, 1}
    npu_patch.restore()
    assert_near(found, results(model, x))
    assert ran(report) == 1


@pytest.mark.parametrize("given", [True, False], ids=["with a model", "without"])
def test_by_default_nothing_is_rebound_where_times_mean_nothing(
    given: bool, simulated: None, npu: torch.device
) -> None:
    report = npu_patch.apply(*([siglip().to(npu)] if given else []))
    assert not outcomes(report) and {cls: cls.forward for cls in FORWARDS} == FORWARDS


@pytest.mark.parametrize("switches", [{"patch_embedding": False}, {"vision": False}], ids=str)
def test_switched_off_says_by_what(switches: dict[str, bool], npu: torch.device) -> None:
    report = npu_patch.apply(siglip().to(npu), **switches)
    (name,) = switches
    assert not outcomes(report) and f"patch_embedding: switched off by apply({name}=False)" in report.notes


def test_a_model_without_patches_has_no_line_in_its_report(npu: torch.device) -> None:
    report = npu_patch.apply(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)).to(npu), patch_embedding=True)
    assert not [each for each in report if each.patch == "patch_embedding"]


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / weight.std(), bias)


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Named(nn.Conv2d):
    """As torch's own."""


OTHERS: dict[str, Callable[[], nn.Conv2d]] = {
    "overlapping": lambda: nn.Conv2d(4, 6, 4, 2),
    "apart": lambda: nn.Conv2d(4, 6, 2, 4),
    "unlike sides": lambda: nn.Conv2d(4, 6, (4, 2), (2, 4)),
    "padded": lambda: nn.Conv2d(4, 6, 4, 4, padding=2),
    "same": lambda: nn.Conv2d(4, 6, 3, 1, padding="same"),
    "circular": lambda: nn.Conv2d(4, 6, 4, 4, padding=2, padding_mode="circular"),
    "dilated": lambda: nn.Conv2d(4, 6, 2, 2, dilation=2),
    "in groups": lambda: nn.Conv2d(4, 6, 4, 4, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 4, 4, groups=4),
    "of one pixel": lambda: nn.Conv2d(4, 6, 1, 1),
    "of standardised weights": lambda: Standardised(4, 6, 4, 4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_convolutions_are_the_originals_bit_by_bit(name: str, npu: torch.device) -> None:
    model = nn.Sequential(OTHERS[name]()).to(npu)
    x = pixels((2, 4, 12, 12), npu)
    before = results(model, x)
    report = npu_patch.apply(nn.ModuleList([model, nn.Conv2d(4, 6, 4, 4)]), patch_embedding=True)
    found = results(model, x)
    assert ran(report) == 0 and sum(fell_through(report).values()) == 1
    assert all(torch.equal(found[each], before[each]) for each in before)


@pytest.mark.parametrize("cls", [Named, Doubled])
def test_subclasses_are_served_by_what_they_compute(cls: type[nn.Conv2d], npu: torch.device) -> None:
    model, x = nn.Sequential(cls(3, 6, 4, 4)).to(npu), pixels((2, 3, 12, 12), npu)
    before = results(model, x)
    report = npu_patch.apply(patch_embedding=True)
    assert_near(results(model, x), before)
    assert ran(report) == 1


def test_a_setting_that_is_changed_on_a_live_layer_is_seen(npu: torch.device) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 6, 4, 4)).to(npu), pixels((2, 3, 12, 12), npu)
    report = npu_patch.apply(model, patch_embedding=True)
    model(x)
    model[0].stride = (2, 2)
    assert model(x).shape == (2, 6, 5, 5) and ran(report) == 1
    model[0].stride = (4, 4)
    assert model(x).shape == (2, 6, 3, 3) and ran(report) == 2


def test_the_shapes_of_padding_that_says_valid_are_patches(npu: torch.device) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 6, 4, 4, padding="valid")).to(npu), pixels((2, 3, 13, 14), npu)
    before = results(model, x)
    report = npu_patch.apply(model, patch_embedding=True)
    assert_near(results(model, x), before)
    assert ran(report) == 1


# Who stands around the layer.


def test_hooks_hear_of_every_call(npu: torch.device) -> None:
    model, x = siglip().to(npu), pixels((2, 3, 12, 12), npu)
    heard: list[str] = []
    conv = model.patch_embedding
    conv.register_forward_pre_hook(lambda module, given: heard.append("before"))
    conv.register_forward_hook(lambda module, given, result: heard.append("after"))
    conv.register_full_backward_pre_hook(lambda module, gradient: heard.append("backward"))
    conv.register_full_backward_hook(lambda module, gradient, result: heard.append("gradients"))
    before = results(model, x)
    expected, heard[:] = list(heard), []
    report = npu_patch.apply(model, patch_embedding=True)
    assert_near(results(model, x), before)
    assert ran(report) == 1 and heard == expected == ["before", "after", "backward", "gradients"]


def test_a_hook_that_changes_the_input_is_followed(npu: torch.device) -> None:
    model, x = siglip().to(npu), pixels((2, 3, 12, 12), npu)
    model.patch_embedding.register_forward_pre_hook(lambda module, given: (given[0] * 3.0,))
    before = results(model, x)
    report = npu_patch.apply(model, patch_embedding=True)
    assert_near(results(model, x), before)
    assert ran(report) == 1


def test_a_parametrized_weight_is_the_one_that_is_multiplied(npu: torch.device) -> None:
    model, x = qwen2_vl().to(npu), pixels((10, 96), npu)
    nn.utils.parametrizations.weight_norm(model.proj)
    before = results(model, x)
    report = npu_patch.apply(model, patch_embedding=True)
    assert_near(results(model, x), before)
    assert ran(report) == 1


@pytest.mark.parametrize("order", ["patched first", "adapted first"])
@pytest.mark.parametrize("name", ["qwen2_vl", "siglip"])
def test_adapters_of_peft_on_the_layer(name: str, order: str, npu: torch.device) -> None:
    from peft import LoraConfig, get_peft_model

    make, shape = MODELS[name]
    torch.manual_seed(3)
    model = make().to(npu)
    config = LoraConfig(
        r=2, target_modules=["proj" if name == "qwen2_vl" else "patch_embedding"], init_lora_weights=False
    )
    report = npu_patch.apply(model, patch_embedding=True) if order == "patched first" else None
    adapted = get_peft_model(model, config).to(npu)
    report = report or npu_patch.apply(adapted, patch_embedding=True)
    x = pixels(shape, npu)
    found = results(adapted, x)
    assert ran(report) == 2  # the layer itself, and the first of the adapter's two
    npu_patch.restore()
    expected = results(adapted, x)
    assert all(("lora" in each) for each in expected.keys() - {"output", "input"})
    assert_near(found, expected)


def test_a_forward_that_accelerate_keeps_is_reached(npu: torch.device) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, x = siglip().to(npu), pixels((2, 3, 12, 12), npu)
    add_hook_to_module(model.patch_embedding, ModelHook())
    before = results(model, x)
    report = npu_patch.apply(model, patch_embedding=True)
    assert_near(results(model, x), before)
    assert ran(report) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["qwen2_vl", "siglip"])
def test_under_autocast_it_computes_in_half_precision(name: str, dtype: torch.dtype, npu: torch.device) -> None:
    make, shape = MODELS[name]
    model, x = make().to(npu), pixels(shape, npu)

    def autocast(x: Tensor) -> Tensor:
        with torch.autocast("npu", dtype=dtype):
            return model(x)

    model_results = lambda: results(_Called(model, autocast), x)  # noqa: E731
    before = model_results()
    report = npu_patch.apply(model, patch_embedding=True)
    found = model_results()
    assert ran(report) == 1
    with torch.autocast("npu", dtype=dtype):
        convolution = next(each for each in model.modules() if isinstance(each, tuple(FORWARDS)))
        assert convolution(pixels((1, 3, *convolution.kernel_size), npu)).dtype == dtype
    assert_near(found, before, 2.0**-7)
    assert {name: each.grad.dtype for name, each in model.named_parameters() if each.grad is not None} == {
        name: torch.float32 for name, each in model.named_parameters()
    }


class _Called(nn.Module):
    def __init__(self, model: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode", "checkpointed", "frozen"])
def test_modes(mode: str, npu: torch.device) -> None:
    model, x = qwen2_vl().to(npu), pixels((10, 96), npu)
    report = npu_patch.apply(model, patch_embedding=True)
    expected = model(x)
    if mode == "checkpointed":
        out = torch.utils.checkpoint.checkpoint(model, x.requires_grad_(), use_reentrant=False)
        out.sum().backward()
        assert ran(report) == 3 and x.grad is not None
    else:
        model.requires_grad_(mode != "frozen").train(mode != "eval")
        around = getattr(torch, mode)() if mode in ("no_grad", "inference_mode") else contextlib.nullcontext()
        with around:
            out = model(x)
        assert ran(report) == 2 and out.requires_grad == (mode == "eval")
    assert torch.equal(out, expected)


def test_the_compiler_gets_the_convolution(npu: torch.device) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 6, 4, 4)).to(npu), pixels((2, 3, 12, 12), npu)
    before = model(x)
    report = npu_patch.apply(model, patch_embedding=True)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, backend=backend, fullgraph=True)(x), before)
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert len(called) == 1 and "conv2d" in called[0] and ran(report) == 0


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_tensors_elsewhere_are_the_originals(where: str, npu: torch.device) -> None:
    model = siglip()
    report = npu_patch.apply(model, patch_embedding=True)
    x = pixels((2, 3, 12, 12), where)
    out = model.to(where).patch_embedding(x)
    assert out.shape == (2, 16, 3, 3) and ran(report) == 0
    assert fell_through(report) == {f"input on {where}": 1}


def test_a_convolution_that_somebody_binds_anew_is_theirs(monkeypatch: pytest.MonkeyPatch, npu: torch.device) -> None:
    model, x = siglip().to(npu), pixels((2, 3, 12, 12), npu)
    report = npu_patch.apply(model, patch_embedding=True)
    asked: list[Any] = []
    own = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *args, **kwargs: asked.append(args) or own(*args, **kwargs))
    model(x)
    assert len(asked) == 1 and ran(report) == 0


def test_copies_and_pickles_are_of_torchs_class(npu: torch.device) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 6, 4, 4)).to(npu), pixels((2, 3, 12, 12), npu)
    report = npu_patch.apply(model, patch_embedding=True)
    expected = model(x)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.cpu())).to(npu)):
        assert type(each[0]) is nn.Conv2d and torch.equal(each(x), expected)
    assert ran(report) == 3


def test_transforms_of_torch_func(npu: torch.device) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 6, 4, 4)).to(npu), pixels((3, 2, 3, 12, 12), npu)
    parameters = dict(model.named_parameters())

    def of_each() -> dict[str, Tensor]:
        loss = lambda own, x: torch.func.functional_call(model, own, x).square().sum()  # noqa: E731
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)

    before = of_each()
    npu_patch.apply(model, patch_embedding=True)
    found = of_each()
    assert max(relative_error(found[name].detach().cpu(), before[name].detach().cpu()) for name in before) < 1e-6


# What `auto` takes: times are made up, the decision is real. On the CPU, as times on the simulated NPU mean nothing.


@dataclasses.dataclass
class Clock:
    """What either takes, in ms."""

    product: float = 1.0
    convolution: float = 2.0
    timed: list[str] = dataclasses.field(default_factory=list)
    _last: str = ""

    def noted(self, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*call: Any) -> Tensor:
            self._last = name
            return function(*call)

        return run

    def stopwatch(self, function: Callable[[], Any]) -> float:
        function()
        self.timed.append(self._last)
        return 1e-3 * float(getattr(self, self._last))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Clock]:
    from npu_patch.ops import patch_embedding as op

    found = Clock()
    (product,) = PATCH_EMBEDDING.implementations
    product = dataclasses.replace(product, device_types=("cpu",), run=found.noted("product", product.run))
    on_cpu = dataclasses.replace(PATCH_EMBEDDING, implementations=(product,))
    original = dataclasses.replace(op._ORIGINAL, run=found.noted("convolution", op.convolution))
    monkeypatch.setattr(op, "PATCH_EMBEDDING", on_cpu)
    monkeypatch.setattr(op, "_ORIGINAL", original)
    monkeypatch.setattr(op, "TIMED_APART", 6)
    monkeypatch.setattr(op, "PATCHES", 6)
    patch = dataclasses.replace(patch_embedding.PATCH, op=on_cpu)
    monkeypatch.setattr(lifecycle, "CATALOGUE", (patch,))
    monkeypatch.setattr(measurer, "clock", lambda device: made_up(found.stopwatch))
    monkeypatch.setenv("TWINKLE_NPU_TRITON_CACHE", str(tmp_path / "times.json"))
    yield found
    npu_patch.restore()


def test_auto_takes_the_faster_product_and_the_report_says_both_times(clock: Clock) -> None:
    model, x = qwen2_vl(), pixels((10, 96), "cpu")
    before = results(model, x)
    report = npu_patch.apply(model, device="cpu")
    (outcome,) = outcomes(report)
    assert "patches, 16 of 3 x 2 x 4 x 4, float32: 1 ms against 2 ms" in outcome.implementation
    assert_near(results(model, x), before)
    assert ran(report) == 1 and set(clock.timed) == {"product", "convolution"}


def test_auto_leaves_a_slower_product_and_says_so(clock: Clock) -> None:
    clock.product = 6.9
    model, x = qwen2_vl(), pixels((10, 96), "cpu")
    report = npu_patch.apply(model, device="cpu")
    (outcome,) = outcomes(report)
    model(x)
    assert outcome.implementation == "the original" and "6.9 ms against 2 ms" in outcome.declined[PRODUCT]
    assert ran(report) == 0 and fell_through(report) == {NOT_FASTER: 1}


def test_sizes_that_were_not_measured_are_the_originals(clock: Clock) -> None:
    report = npu_patch.apply(qwen2_vl(), device="cpu")
    nn.Conv3d(3, 17, (2, 4, 4), (2, 4, 4), bias=False)(pixels((5, 3, 2, 4, 4), "cpu"))
    assert ran(report) == 0 and sum(fell_through(report).values()) == 1
    nn.Conv3d(3, 16, (2, 4, 4), (2, 4, 4), bias=False)(pixels((5, 3, 2, 4, 4), "cpu"))
    assert ran(report) == 1


def test_one_and_zero_measure_nothing(clock: Clock) -> None:
    for forced in (True, False):
        with npu_patch.applied(qwen2_vl(), device="cpu", patch_embedding=forced) as report:
            assert bool(outcomes(report)) is forced and not clock.timed


def test_without_a_model_nothing_is_measured_nor_rebound_until_one_is_given(clock: Clock) -> None:
    assert not outcomes(npu_patch.apply(device="cpu")) and not clock.timed
    assert {cls: cls.forward for cls in FORWARDS} == FORWARDS
    model = qwen2_vl()
    with npu_patch.applied(model, device="cpu") as report:
        model(pixels((10, 96), "cpu"))
        assert ran(report) == 1
    assert {cls: cls.forward for cls in FORWARDS} == FORWARDS


def test_a_second_model_is_measured_at_its_own_sizes(clock: Clock) -> None:
    first, second = qwen2_vl(), qwen3_vl()
    npu_patch.apply(first, device="cpu")
    measured = len(clock.timed)
    report = npu_patch.apply(second, device="cpu")
    assert len(clock.timed) == 2 * measured  # with a bias
    first(pixels((10, 96), "cpu")), second(pixels((10, 96), "cpu"))
    assert ran(report) == 2


@pytest.mark.parametrize("choice", [PRODUCT, tuning.ORIGINAL])
@pytest.mark.parametrize("model_given", [True, False])
def test_a_tuning_file_wins_over_the_clock(
    choice: str, model_given: bool, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock.product = 1.0 if choice == tuning.ORIGINAL else 9.0
    model, x = qwen2_vl(), pixels((10, 3, 2, 4, 4), "cpu")
    signatures = [(x, choice), (x[:, :1], PRODUCT)]  # not all of them the original, or the site were not bound
    decisions = [
        tuning.Decision("patch_embedding", SITE, "kernel by kernel", signature_of(x, model.proj.weight, None), name)
        for x, name in signatures
    ]
    tuning.write(tmp_path / "tuned.json", "cpu", decisions)
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(tmp_path / "tuned.json"))
    report = npu_patch.apply(*([model] if model_given else []), device="cpu")
    model.proj(x)
    assert ran(report) == (choice == PRODUCT)
    if choice == tuning.ORIGINAL:
        assert fell_through(report) == {"tuned: original": 1}
