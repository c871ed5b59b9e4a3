"""In generation one launch adds, normalizes and quantises for layers of int8 weights; whoever else looks at the norm
gets the one that the plain norm computes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import npu_patch
from npu_patch import simulator
from npu_patch.ops.w8a8.layer import W8A8Linear
from npu_patch.patches.w8a8 import add_rms_norm
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
from npu_patch.waiting.quantised_norms import QuantisedNorm
from tests.support.generating import COMPARED, STATIC, calls_of, tokens
from tests.support.tiny_models import tiny
from tests.support.w8a8 import in_int8

ADD, NORM, QUANT = "aten::add", "npu::npu_rms_norm", "npu::npu_dynamic_quant"
FUSED = "npu::npu_add_rms_norm_dynamic_quant"
IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
SEVERAL = "several tokens"
NO_FURTHER = 1.1  # than one after the other
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def sites(report: Report) -> list[Outcome]:
    return [each for each in report if each.patch == "w8a8_norm"]


def site(report: Report) -> Outcome:
    (found,) = sites(report)
    return found


def on(npu: torch.device, family: str = "qwen3", dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> Any:
    return in_int8(tiny(family, **sizes).to(dtype)).to(npu).eval()


def step(model: Any, count: int = 1) -> Tensor:
    """The logits of the last of `count` single tokens after a prompt."""
    ids = IDS.to(next(model.parameters()).device)
    with torch.no_grad():
        found = model(input_ids=ids)
    for _ in range(count):
        found = model(input_ids=ids[:, :1], past_key_values=found.past_key_values)
    return found.logits.detach().cpu()


@contextlib.contextmanager
def apart(model: Any) -> Iterator[Report]:
    """`applied(model)` without what is tested here."""
    with pytest.MonkeyPatch.context() as without:
        without.setattr(add_rms_norm, "_in_int8", lambda *_: False)
        with npu_patch.applied(model) as report:
            yield report


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_layer_saves_two_launches(dtype: torch.dtype, mode: str, npu: torch.device) -> None:
    model = on(npu, dtype=dtype)
    counts = []
    for applied in (apart, npu_patch.applied):
        with applied(model) as report, MODES[mode]():
            found = model(input_ids=IDS.to(npu))
            with simulator.count() as counted:
                model(input_ids=IDS.to(npu)[:, :1], past_key_values=found.past_key_values)
            counts.append(counted)
        served = sites(report)
        assert not served if applied is apart else site(report).layers == site(report).calls.ran == 2
    without, fused = counts
    assert without.launches - fused.launches == 2 * 2
    for name, by in {ADD: -2, NORM: -2, QUANT: -2, FUSED: 2}.items():
        assert fused.by_op.get(name, (0,))[0] - without.by_op.get(name, (0,))[0] == by, name
    assert dict(site(report).calls.fell_through) == {SEVERAL: 2}


class Dequantised(nn.Linear):
    """What an int8 layer stands for."""


def dequantised(model: Any) -> Any:
    exact = copy.deepcopy(model).cpu()
    for name, layer in list(exact.named_modules()):
        if isinstance(layer, W8A8Linear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight.data = layer.weight.double() * layer.weight_scale.double()
            exact.set_submodule(name, linear)
    return exact.double()


def test_logits_are_no_further_from_the_dequantised_model_in_float64(npu: torch.device) -> None:
    ways = {"apart": apart, "fused": npu_patch.applied}
    distances: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(3):
        model = on(npu, seed=seed)
        exact = step(dequantised(model), 3)
        for name, applied in ways.items():
            with applied(model), torch.no_grad():
                distances[name].append(float((step(model, 3).double() - exact).norm() / exact.norm()))
    assert sum(distances["fused"]) <= NO_FURTHER * sum(distances["apart"])
    assert distances["fused"] != distances["apart"]


def test_a_captured_step_has_it(npu: torch.device) -> None:
    model = on(npu, max_position_embeddings=256)
    with npu_patch.applied(model, captured_decode=False) as report:
        expected = tokens(model, 6)
        assert site(report).calls.ran == 2 * 5
    with npu_patch.applied(model):
        assert torch.equal(tokens(model, 6, **STATIC), expected)
        with simulator.count() as counted:
            assert torch.equal(tokens(model, 6, **STATIC), expected)
        assert calls_of().ran == 2 * 5 - COMPARED and not calls_of().fell_through
        assert counted.replayed_by_op[FUSED][0] == 2 * counted.replays == 2 * 5


def reading(seen: list[Any]) -> Callable[..., None]:
    def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(given[0], Tensor)
        seen.append((given[0] * 1.0).cpu())

    return hook


def writing(seen: list[Any]) -> Callable[..., None]:
    def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
        given[0].mul_(0.5)

    return hook


def replacing(seen: list[Any]) -> Callable[..., Any]:
    return lambda module, given: (given[0] + 1.0,)


def through_a_view(seen: list[Any]) -> Callable[..., None]:
    def hook(module: nn.Module, given: tuple[Any, ...]) -> None:
        rows = given[0].view(-1, given[0].shape[-1])
        rows += 1.0

    return hook


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use", [reading, writing, replacing, through_a_view])
def test_who_needs_the_norm_in_floating_point_gets_the_plain_one_and_is_left_alone_afterwards(
    use: Callable[..., Any], mode: str, npu: torch.device
) -> None:
    """To the bit, where that is each layer; and the report says who."""
    model = on(npu)
    seen: list[list[Any]] = [[], []]
    results = []
    for of, applied in zip(seen, (apart, npu_patch.applied), strict=True):
        handles = [layer.mlp.register_forward_pre_hook(use(of)) for layer in model.model.layers]
        with applied(model) as report, MODES[mode]():
            results.append(step(model, 3))
        for handle in handles:
            handle.remove()
    if use is reading:
        assert torch.equal(seen[0][2], seen[1][2]), "of the first layer, in the first single token"
    rows_taken = use is reading  # of the first single token: nobody can have changed what they are of
    assert torch.equal(*results) is not rows_taken
    reasons = site(report).calls.fell_through
    assert site(report).calls.ran == 0 and reasons.total() == 2 * 4
    (used,) = [each for each in reasons if each.startswith("the norm is used (")]
    assert reasons == {SEVERAL: 2, used: 2, "its norm was used in floating point": 4}


def test_a_hook_on_an_int8_layer_hears_it_and_costs_nothing(npu: torch.device) -> None:
    model = on(npu)
    heard: list[Any] = []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda module, given, y: heard.append((given[0].shape, y.shape)))
    with npu_patch.applied(model) as report, torch.no_grad():
        step(model)
    assert heard[-1] == ((2, 1, model.config.hidden_size), (2, 1, model.config.intermediate_size))
    assert site(report).calls.ran == 2


def test_experts_and_their_router_get_the_plain_norm(npu: torch.device) -> None:
    """Shared experts are int8 layers beside them, so each norm is tried once."""
    model = on(npu, "glm4_moe", first_k_dense_replace=0)
    with torch.no_grad():
        with apart(model):
            expected = step(model)
        with npu_patch.applied(model) as report:
            step(model)
            assert torch.equal(step(model), expected)
    (used,) = [each for each in site(report).calls.fell_through if each.startswith("the norm is used (")]
    assert site(report).calls.ran == 0 and site(report).calls.fell_through[used] == 2


@pytest.mark.parametrize("state", ["active", "disabled", "merged"])
def test_adapters_get_the_plain_norm_and_layers_without_an_active_one_the_rows(state: str, npu: torch.device) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["gate_proj", "up_proj"], init_lora_weights=False)
    model = get_peft_model(on(npu), config)
    for layer in model.modules():
        if state == "merged" and hasattr(layer, "merged_adapters"):
            layer.merged_adapters = ["default"]
    results = []
    for applied in (apart, npu_patch.applied):
        with applied(model) as report, torch.no_grad():
            if state == "disabled":
                with model.disable_adapter():
                    results.append(step(model, 3))
            else:
                results.append(step(model, 3))
    calls = site(report).calls
    if state == "active":
        assert torch.equal(*results)
        assert dict(calls.fell_through) == {
            SEVERAL: 2,
            "the norm is used (an adapter) before it is multiplied in int8": 2,
            "its norm was used in floating point": 4,
        }
    else:
        assert calls.ran == 6 and not torch.equal(*results)


def autocast(dtype: torch.dtype, model: Any) -> None:
    with torch.no_grad(), torch.autocast("npu", dtype):
        step(model, 2)


def with_gradients(model: Any) -> None:
    step(model)


def alone(model: Any) -> None:
    with torch.no_grad():
        model(input_ids=IDS[:, :1].to(model.device), use_cache=False)


def on_the_cpu(model: Any) -> None:
    with torch.no_grad():
        step(model.cpu())


def listened_to(model: Any) -> None:
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        step(model)


@pytest.mark.parametrize(
    ("run", "ran", "reasons"),
    [
        (partial(autocast, torch.bfloat16), 4, {SEVERAL: 2}),
        (partial(autocast, torch.float16), 0, {"the branch is used (add) before it is added": 4}),
        (with_gradients, 0, {"with gradients": 2}),
        (alone, 0, {"without a cache": 2}),
        (on_the_cpu, 0, {"its result is on cpu": 4}),
        (listened_to, 1, {"hooks on post_attention_layernorm": 2, SEVERAL: 1}),
    ],
)
def test_what_is_not_served_is_counted_under_its_reason(
    run: Callable[[Any], None], ran: int, reasons: dict[str, int], npu: torch.device
) -> None:
    model = on(npu)
    with npu_patch.applied(model) as report:
        run(model)
    calls = site(report).calls
    assert calls.ran == ran and reasons.items() <= calls.fell_through.items()


@pytest.mark.parametrize(
    ("family", "dtype", "reason"),
    [
        ("qwen3", torch.float32, "input of dtype float32, 2 dimensions, 48 wide"),
        ("qwen3_5", torch.bfloat16, "the norm is '1 + weight': the operator multiplies by the weight as it is"),
        ("qwen3_next", torch.bfloat16, "the norm is '1 + weight': the operator multiplies by the weight as it is"),
    ],
)
def test_a_model_that_the_operator_does_not_take_is_left_alone(
    family: str, dtype: torch.dtype, reason: str, npu: torch.device
) -> None:
    model = on(npu, family, dtype)
    with npu_patch.applied(model) as report:
        assert {(each.status, each.reason) for each in sites(report)} == {("skipped", reason)}
        assert not [each for each in report.warnings if "w8a8_norm" in each]


@pytest.mark.parametrize("left", [("proj",), ("gate_proj", "up_proj", "down_proj")], ids=["none", "attention alone"])
def test_a_model_whose_norms_of_sums_feed_nothing_in_int8_has_no_line_of_it(
    left: tuple[str, ...], npu: torch.device
) -> None:
    model = in_int8(tiny("qwen3").bfloat16(), *left).to(npu)
    with npu_patch.applied(model) as report:
        assert not sites(report) and "w8a8_norm" not in str(report)


def test_a_model_in_bfloat16_of_the_same_classes_computes_what_it_did(npu: torch.device) -> None:
    """Each of its norms is tried once."""
    model, other = on(npu), tiny("qwen3").bfloat16().to(npu).eval()
    with torch.no_grad():
        with apart(model):
            expected = step(other, 3)
        with npu_patch.applied(model) as report:
            assert torch.equal(step(other, 3), expected)
            assert site(report).calls.fell_through["its norm was used in floating point"] == 4
            step(model)
    assert site(report).calls.ran == 2


@pytest.fixture
def norm(npu: torch.device) -> Iterator[tuple[Any, Any, list[str]]]:
    """Of a layer's norm: what it returns for a sum, the sum, and who is told."""
    model = on(npu)
    layer, kept = model.model.layers[0], []
    handle = layer.mlp.gate_proj.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    with npu_patch.applied(model) as report, torch.no_grad():
        step(model)
        handle.remove()
        yield kept[-1], layer, report


def test_what_is_kept_of_it_is_made_before_its_sum_is_handed_out(norm: tuple[Any, ...], npu: torch.device) -> None:
    """The hook kept it beyond its layer, whose sum went on to be added to: it is the plain norm of that sum."""
    kept, layer, report = norm
    assert type(kept) is QuantisedNorm and kept.settled and kept._made is not None
    expected = layer.post_attention_layernorm(kept.total)
    kept.total.add_(1.0)
    assert torch.equal(kept * 1.0, expected)
    assert site(report).calls.ran == 2, "its rows were taken first"


@pytest.mark.parametrize("first", ["triton", "int8"])
def test_beside_the_kernel_for_both_each_serves_what_it_can(first: str, npu: torch.device, two_cores: None) -> None:
    """The kernel a prompt, and the norm that somebody needs in floating point, from its second token on."""
    pytest.importorskip("triton")
    model = on(npu)
    model.model.layers[0].mlp.register_forward_pre_hook(reading([]))
    forward = type(model.model.layers[0].self_attn).forward
    npu_patch.apply(model, triton=True) if first == "triton" else npu_patch.apply(model)
    report = npu_patch.apply(model, triton=True)
    try:
        with torch.no_grad():
            step(model, 2)
        by = {each.patch: each.calls for each in report if each.patch in ("w8a8_norm", "add_rms_norm")}
        assert by["add_rms_norm"].ran == (2 + 1 if first == "triton" else 6)
        assert by["w8a8_norm"].ran == (2 if first == "triton" else 0)
    finally:
        npu_patch.restore()
    assert type(model.model.layers[0].self_attn).forward is forward
