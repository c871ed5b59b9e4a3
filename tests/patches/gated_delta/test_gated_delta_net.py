"""Gated delta nets, patched: what they compute, what is observed of them, and packed sequences."""

from __future__ import annotations

import copy
import functools
import pickle
import statistics
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

import npu_patch
from npu_patch import simulator
from npu_patch.ops.readings import NotRead
from npu_patch.patches.gated_delta.inline_convolution import READING, Door
from npu_patch.patches.gated_delta.inline_convolution import read as read_inline
from npu_patch.probe.gated_delta import read
from npu_patch.sites.sites import innermost
from tests.support.gradients import in_float64, loss_and_gradients, relative_error
from tests.support.parity import RATIO, apart, ratios, why_unequal
from tests.support.tiny_models import tiny, tiny_batch

OTHERS_OFF = {"fused_ops": False, "moe_patch": False, "lora": False, "loss": False}
applied = functools.partial(npu_patch.applied, **OTHERS_OFF)
GATED_DELTA = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
LINEAR_ONLY = {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2}
NAMES = ("causal_conv1d_fn", "causal_conv1d_update", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")


def counted(report: npu_patch.Report) -> dict[str, int]:
    return {name: outcome.calls.ran for outcome in report if (name := outcome.site.rsplit(".", 1)[-1]) in NAMES}


@pytest.mark.parametrize("family", GATED_DELTA)
@pytest.mark.parametrize("length", [13, 70])
def test_loss_and_every_gradient(family: str, length: int, npu: torch.device) -> None:
    """What float32 cannot tell to 1e-6 is all that gives the decay."""
    model = tiny(family)
    batch = tiny_batch(length=length)
    on_cpu = copy.deepcopy(model)
    model = model.to(npu)
    original = loss_and_gradients(model, batch)
    with applied(model) as report:
        patched = loss_and_gradients(model, batch)
    assert counted(report) == dict(zip(NAMES, (1, 0, 1, 0), strict=True))
    assert not report.failed and not report.skipped
    decay = ("dt_bias", "A_log", "in_proj_a.weight", "in_proj_ba.weight")
    assert all(name.endswith(decay) for name in apart(patched, original))
    assert why_unequal(on_cpu, batch, original, patched) is None


@pytest.mark.parametrize("family", GATED_DELTA)
def test_generation_token_for_token(family: str, npu: torch.device) -> None:
    # torch_npu 2.9 fails in scaled_dot_product_attention with a padded batch.
    model = tiny(family, attn_implementation="eager").to(npu)
    ids = tiny_batch(length=9)["input_ids"].to(npu)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    generate = functools.partial(model.generate, ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    expected = generate()
    with applied(model) as report:
        found = generate()
    assert torch.equal(found, expected)
    assert counted(report) == dict(zip(NAMES, (1, 11, 1, 11), strict=True))
    assert not any(outcome.calls.fell_through for outcome in report if outcome.patch != "captured_decode")


def test_training_under_autocast(npu: torch.device) -> None:
    """As Trainer(bf16=True) trains a float32 model; over several, since roundings favour either in one."""
    found: list[float] = []
    for seed in range(4):
        model = tiny("qwen3_5", seed=seed)
        batch = tiny_batch(length=70, seed=seed)
        exact = loss_and_gradients(in_float64(model), batch)
        model = model.to(npu)
        with torch.autocast("npu", torch.bfloat16):
            original = loss_and_gradients(model, batch)
            with applied(model) as report:
                patched = loss_and_gradients(model, batch)
        assert not any(outcome.calls.fell_through for outcome in report)
        found += ratios(patched, original, exact)
    assert statistics.geometric_mean(found) < RATIO


def test_launches_of_a_step(npu: torch.device, simulated: None) -> None:
    """16 chunks: the original walks over them, and its backward back."""
    model = tiny("qwen3_5", max_position_embeddings=1024).to(npu)
    batch = tiny_batch(batch=1, length=1024)
    with simulator.count() as original:
        loss_and_gradients(model, batch)
    with applied(model), simulator.count() as patched:
        loss_and_gradients(model, batch)
    assert patched.launches < 0.5 * original.launches, (patched.launches, original.launches)


def packed_inputs(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, dict[str, Any]]:
    bounds = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
    index = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    kwargs: dict[str, Any] = {"seq_idx": index.to(device, torch.int32), "position_ids": positions.to(device)}
    kwargs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    kwargs |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return tiny_batch(batch=1, length=sum(lengths))["input_ids"].to(device), kwargs


@pytest.mark.parametrize("without", [(), ("seq_idx",)], ids=["all", "lengths alone"])
@pytest.mark.parametrize("family", GATED_DELTA)
def test_packed_sequences_are_those_of_each_alone(family: str, without: tuple[str, ...], npu: torch.device) -> None:
    """Loss gradients, too: what the first sequence is has no influence on the others'. (Without a cache: beside one,
    transformers' own masks let packed sequences attend to each other.)"""
    model = tiny(family).to(npu)
    lengths = (5, 1, 66, 3)
    ids, kwargs = packed_inputs(lengths, npu)
    kwargs = {name: value for name, value in kwargs.items() if name not in without}
    weights = torch.randn(ids.shape[1], 101, generator=torch.Generator().manual_seed(0)).to(npu)

    def gradients(packed: bool) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        if packed:
            logits = model(input_ids=ids, use_cache=False, **kwargs).logits
        else:
            parts = ids.split(list(lengths), -1)
            logits = torch.cat([model(input_ids=part, use_cache=False).logits for part in parts], 1)
        (logits[0] * weights).sum().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return {name: tensor.detach().cpu().double() for name, tensor in {"logits": logits, **found}.items()}

    with applied(model) as report:
        together, alone = gradients(True), gradients(False)
    assert not any(outcome.calls.fell_through for outcome in report)
    assert relative_error(together["logits"], alone["logits"]) < 2e-6
    for name in alone:
        assert relative_error(together[name], alone[name]) < 2e-3, name


def test_a_packed_layer_with_a_cache(npu: torch.device) -> None:
    """As in training with use_cache left on: the cache is filled for nothing, the output is that of each alone."""
    model = tiny("qwen3_5").to(npu)
    net = next(layer.linear_attn for layer in model.model.layers if hasattr(layer, "linear_attn"))
    lengths = (5, 1, 66, 3)
    _, kwargs = packed_inputs(lengths, npu)
    x = torch.randn(1, sum(lengths), model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(npu)

    def output(x: Tensor, **kwargs: Any) -> Tensor:
        return net(x, cache_params=DynamicCache(config=model.config), **kwargs).detach().cpu().double()

    with applied(model):
        alone = torch.cat([output(part) for part in x.split(lengths, 1)], 1)
        assert relative_error(output(x, **kwargs), alone) < 2e-6
        assert relative_error(output(x), alone) > 1e-2


def rule_arguments(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 9, 2, 6, generator=generator) for _ in range(2))
    v = torch.randn(1, 9, 4, 5, generator=generator)
    g, beta = -torch.rand(1, 9, 4, generator=generator), torch.rand(1, 9, 4, generator=generator)
    return {"query": q, "key": k, "value": v, "g": g, "beta": beta} | {"use_qk_l2norm_in_kernel": True}


def test_packed_calls_that_are_not_served_are_refused(npu: torch.device) -> None:
    bounds = torch.tensor((0, 4, 9), dtype=torch.int32)
    with applied(tiny("qwen3_5").to(npu)) as report:
        with pytest.raises(ValueError, match=r"keep packed sequences apart|leak into each other"):
            modeling.torch_chunk_gated_delta_rule(**rule_arguments("cpu"), cu_seqlens=bounds)
        with pytest.raises(ValueError, match=r"leak into each other.*input on cpu"):
            modeling.causal_conv1d_fn(torch.randn(1, 3, 9), torch.randn(3, 4), None, "silu", cu_seq_lens_q=bounds)
        one, arguments = bounds[[0, 2]].to(npu), on(npu, rule_arguments("cpu"))
        alone, _ = modeling.torch_chunk_gated_delta_rule(**arguments, cu_seqlens=one)
        assert torch.equal(alone, modeling.torch_chunk_gated_delta_rule(**arguments)[0])
    assert not report.failed


def on(device: torch.device, arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in arguments.items()}


@pytest.mark.parametrize("given", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_packed_models_whose_layers_are_not_told_are_refused(given: str, npu: torch.device) -> None:
    """Position ids never reach these layers; before transformers 5.9 nothing does, which this layer stands for."""
    model = tiny("qwen3_5", **LINEAR_ONLY).to(npu)
    ids, kwargs = packed_inputs((5, 4), npu)
    kwargs = {given: kwargs[given]}
    net = model.model.layers[1].linear_attn
    net.forward = lambda hidden_states, cache_params=None, attention_mask=None, **_: type(net).forward(
        net, hidden_states, cache_params, attention_mask
    )
    with applied(model):
        with pytest.raises(ValueError, match=rf"leak into each other.*\({given}\).*return_seq_idx=True"):
            model(input_ids=ids, use_cache=False, **kwargs)
        modeling.torch_chunk_gated_delta_rule(**on(npu, rule_arguments("cpu")))  # the refusal is forgotten
        one, kwargs = packed_inputs((9,), npu)
        model(input_ids=one, use_cache=False, **{given: kwargs[given]})
        padding = torch.ones_like(ids)
        model(input_ids=ids, attention_mask=padding, use_cache=False, position_ids=torch.zeros_like(ids))
    model(input_ids=ids, use_cache=False, position_ids=torch.zeros_like(ids))


@pytest.mark.parametrize("without", ["seq_idx", "cu_seq_lens_q"])
def test_half_told_layers_are_refused(without: str, npu: torch.device) -> None:
    """Up to transformers 5.14 `seq_idx` reaches the convolution alone and `cu_seq_lens_q` the rule alone."""
    model = tiny("qwen3_5", **LINEAR_ONLY).to(npu)
    ids, kwargs = packed_inputs((5, 4), npu)
    op = "torch_chunk_gated_delta_rule" if without == "cu_seq_lens_q" else "causal_conv1d_fn"
    with applied(model):
        served = getattr(modeling, op)

        def untold(*args: Any, **passed: Any) -> Any:
            return served(*args, **{n: x for n, x in passed.items() if n not in ("cu_seqlens", *kwargs)})

        with mock.patch.object(modeling, op, untold), pytest.raises(ValueError, match="leak into each other"):
            model(input_ids=ids, use_cache=False, **kwargs)


def test_checkpointed_packed_training(npu: torch.device) -> None:
    """Backward recomputes outside the model's forward."""
    model = tiny("qwen3_5", **LINEAR_ONLY).to(npu).train()
    model.gradient_checkpointing_enable()
    ids, kwargs = packed_inputs((5, 4), npu)
    with applied(model) as report:
        model(input_ids=ids, labels=ids, use_cache=False, **kwargs).loss.backward()
    assert counted(report)["torch_chunk_gated_delta_rule"] == 4


def test_restored_and_reached_again(npu: torch.device) -> None:
    before = {name: getattr(modeling, name) for name in NAMES}
    model = tiny("qwen3_5").to(npu)
    with applied(model):
        captured = modeling.torch_chunk_gated_delta_rule
        assert captured is not before["torch_chunk_gated_delta_rule"]
        assert captured.__name__ == "torch_chunk_gated_delta_rule"
        pickle.dumps(copy.deepcopy(model).state_dict())
    assert all(getattr(modeling, name) is original for name, original in before.items())
    assert captured is not before["torch_chunk_gated_delta_rule"]
    arguments = rule_arguments("cpu")
    assert torch.equal(captured(**arguments)[0], before["torch_chunk_gated_delta_rule"](**arguments)[0])


def test_switched_off_alone(npu: torch.device) -> None:
    model = tiny("qwen3_5").to(npu)
    with npu_patch.applied(model, fla=False) as report:
        assert not [outcome for outcome in report if outcome.patch == "gated_delta_net"]
        assert any(outcome.patch == "rms_norm" for outcome in report.patched)
    others = dict.fromkeys(("fused_ops", "moe_patch", "lora", "loss", "vision", "inference", "w8a8"), False)
    with npu_patch.applied(model, **others) as report:
        assert {outcome.patch for outcome in report} == {"gated_delta_net"}


def test_other_tensors_fall_through(npu: torch.device) -> None:
    with applied(tiny("qwen3_5").to(npu)) as report:
        arguments = rule_arguments("cpu")
        expected = innermost(modeling.torch_chunk_gated_delta_rule)(**arguments)[0]
        assert torch.equal(modeling.torch_chunk_gated_delta_rule(**arguments)[0], expected)
        x, weight = torch.randn(2, 3, 7, device=npu), torch.randn(3, 4, device=npu)
        modeling.causal_conv1d_fn(x, weight, None, activation="gelu")
    reasons = [reason for outcome in report for reason in outcome.calls.fell_through]
    assert sorted(reasons) == ["activation gelu", "input on cpu"]


def test_kimi_delta_attention_is_skipped_with_the_reason(npu: torch.device) -> None:
    pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    with applied(), applied() as report:
        skipped = [outcome for outcome in report.skipped if "kimi_linear" in outcome.site]
    assert {outcome.site.rsplit(".", 1)[-1] for outcome in skipped} == {
        "chunk_kimi_delta_attention",
        "recurrent_kimi_delta_attention",
    }
    assert all("each channel of the key" in outcome.reason for outcome in skipped)


def _rule(change: str) -> Any:
    original = innermost(modeling.torch_chunk_gated_delta_rule)

    def changed(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
    ) -> Any:
        if change == "decay":
            g = g * 0.99
        elif change == "scale":
            query = query * (1.0 if use_qk_l2norm_in_kernel else 1.01)
        elif change == "gradient":
            value = value.detach()
        elif change == "state" and initial_state is not None:
            initial_state = initial_state.mT.reshape(initial_state.shape)
        elif change == "heads" and key.shape[2] != value.shape[2]:
            per_key = value.shape[2] // key.shape[2]
            query, key = query.repeat(1, 1, per_key, 1), key.repeat(1, 1, per_key, 1)
        return original(
            query,
            key,
            value,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )

    return changed


@pytest.mark.parametrize("change", ["decay", "scale", "gradient", "state", "heads"])
def test_another_rule_is_not_read(change: str) -> None:
    assert isinstance(read(_rule(change), _rule(change)), NotRead)


def test_the_same_rule_is_read() -> None:
    function = _rule("nothing")
    assert not isinstance(read(function, function), NotRead)


def test_another_convolution_is_not_read() -> None:
    original = innermost(modeling.causal_conv1d_fn)

    def reversed_in_time(hidden_states: Tensor, weight: Tensor, bias: Any = None, activation: Any = None) -> Tensor:
        return original(hidden_states.flip(-1), weight, bias, activation).flip(-1)

    def keeps_its_state(
        x: Tensor, conv_state: Tensor, weight: Tensor, bias: Any = None, activation: Any = None
    ) -> Tensor:
        return innermost(modeling.causal_conv1d_update)(x, conv_state.clone(), weight, bias, activation)

    assert isinstance(read(reversed_in_time, reversed_in_time), NotRead)
    assert isinstance(read(keeps_its_state, keeps_its_state), NotRead)


class InlineLayer(torch.nn.Module):
    """As up to transformers 5.14, and with another convolution where `width` is not the layer's."""

    def __init__(self, config: Any, layer_idx: int, activation: Any = torch.nn.functional.silu) -> None:
        super().__init__()
        self.activation, self.act = config.hidden_act, activation
        self.conv1d = torch.nn.Conv1d(
            config.hidden_size, config.hidden_size, config.linear_conv_kernel_dim, groups=config.hidden_size, padding=3
        )
        self.convolution_fn = None

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        if self.convolution_fn is not None:
            return self.convolution_fn(
                x=x,
                weight=self.conv1d.weight.squeeze(1),
                bias=self.conv1d.bias,
                activation=self.activation,
                seq_idx=None,
            )
        return self.act(self.conv1d(x)[:, :, : x.shape[-1]])


class GeluLayer(InlineLayer):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx, torch.nn.functional.gelu)


def test_inline_convolutions_are_observed() -> None:
    state = torch.random.get_rng_state()
    assert read_inline(InlineLayer, "convolution_fn") is READING
    assert "tolerances away" in read_inline(GeluLayer, "convolution_fn").reason
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_door_answers_for_none_only(monkeypatch: pytest.MonkeyPatch) -> None:
    config = type("Config", (), {"hidden_size": 3, "hidden_act": "silu", "linear_conv_kernel_dim": 4})
    earlier = InlineLayer(config, 0)
    keys = set(earlier.state_dict())
    door = Door("convolution_fn", lambda layer, **kwargs: layer.conv1d.weight.sum())
    monkeypatch.setattr(InlineLayer, "convolution_fn", door, raising=False)
    later = InlineLayer(config, 0)
    for layer in (earlier, later, copy.deepcopy(later), pickle.loads(pickle.dumps(later))):
        assert vars(layer)["convolution_fn"] is None and set(layer.state_dict()) == keys
        assert torch.equal(layer(torch.randn(1, 5, 3)), layer.conv1d.weight.sum())
    later.convolution_fn = len
    assert later.convolution_fn is len
    monkeypatch.undo()
    assert earlier.convolution_fn is None and "convolution_fn" not in vars(InlineLayer)
