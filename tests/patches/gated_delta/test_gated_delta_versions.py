"""Gated delta nets on the installed transformers, whichever it is: the rule and the convolution really run in layers
made before and after `apply`, training and generation are the unpatched model's, and packed sequences are kept apart or
refused."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest
import torch

import npu_patch
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.parity import NEAR, why_unequal
from tests.support.tiny_models import tiny, tiny_batch

FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
OTHERS_OFF = {"fused_ops": False, "moe_patch": False, "lora": False, "loss": False}
LINEAR_ONLY = {"layer_types": ["linear_attention"] * 2, "num_hidden_layers": 2}
TRAINING = ("causal convolution", "gated delta rule over chunks")
DECODING = ("causal convolution's update", "gated delta rule by token")
LENGTHS = (5, 1, 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_trains_and_generates_as_unpatched_through_the_replacements(family: str, npu: torch.device) -> None:
    model = tiny(family).to(npu)
    batch = tiny_batch(length=70)
    original = loss_and_gradients(model, batch)
    tokens = generated(model)
    with npu_patch.applied(model, **OTHERS_OFF) as report:
        trained = loss_and_gradients(model, batch)
        assert [ran(report)[variant] for variant in TRAINING] == [1, 1]  # one of the two layers is linear
        assert torch.equal(generated(model), tokens)
        assert [ran(report)[variant] for variant in TRAINING + DECODING] == [2, 2, 4, 4]
        assert not report.failed
        assert not any(outcome.calls.fell_through for outcome in report if outcome.patch != "captured_decode")
    assert why_unequal(tiny(family), batch, original, trained) is None
    again = loss_and_gradients(model, batch)
    assert all(torch.equal(again[name], original[name]) for name in original)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_made_later_run_and_keep_packed_sequences_apart_or_refuse_them(family: str, npu: torch.device) -> None:
    with npu_patch.applied(**OTHERS_OFF) as report:
        loss_and_gradients(tiny(family).to(npu), tiny_batch(length=70))
        assert [ran(report)[variant] for variant in TRAINING] == [1, 1]
        linear = tiny(family, **LINEAR_ONLY).to(npu)
        alone, packed = alone_and_packed()
        with torch.no_grad():
            expected = torch.cat([linear(input_ids=ids, use_cache=False).logits for ids in alone], 1)
            if not hands_boundaries_to_layers(linear):
                with pytest.raises(ValueError, match="packed sequences would leak into each other"):
                    linear(use_cache=False, **packed)
                return
            found = linear(use_cache=False, **packed).logits
    assert relative_error(found.cpu().double(), expected.cpu().double()) < NEAR


def hands_boundaries_to_layers(model: torch.nn.Module) -> bool:
    """Whether this transformers does: as keyword arguments that the layer does not name."""
    (layer,) = {type(module) for module in model.modules() if type(module).__name__.endswith("GatedDeltaNet")}
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(layer.forward).parameters.values())


def ran(report: npu_patch.Report) -> Counter[str]:
    """Calls that a replacement served, by what was replaced."""
    counted: Counter[str] = Counter()
    for outcome in report:
        if outcome.patch == "gated_delta_net":
            counted[outcome.variant] += outcome.calls.ran
    return counted


def generated(model: torch.nn.Module) -> torch.Tensor:
    prompt = tiny_batch(length=70)["input_ids"][:, :9].to("npu")
    return model.generate(prompt, max_new_tokens=5, do_sample=False)


def alone_and_packed() -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor | int]]:
    """Sequences, and the arguments for a model that gets them in one row."""
    ids = tiny_batch(batch=1, length=sum(LENGTHS))["input_ids"].to("npu")
    bounds = torch.tensor((0, *LENGTHS)).cumsum(0).to("npu", torch.int32)
    packed = {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None].to("npu"),
        "seq_idx": torch.cat([torch.full((n,), i) for i, n in enumerate(LENGTHS)])[None].to("npu", torch.int32),
    }
    packed |= {f"cu_seq_lens_{which}": bounds for which in "qk"}
    packed |= {f"max_length_{which}": max(LENGTHS) for which in "qk"}
    return ids.split(list(LENGTHS), -1), packed
