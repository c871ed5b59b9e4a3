"""Which entries of a registry a model asks for is said by the patch that bound them."""

from __future__ import annotations

import pytest
import torch

import npu_patch
from npu_patch.applying.state import patched_sites
from npu_patch.commands.replay.recording import recorded, run_in_float64, run_original
from npu_patch.commands.verify.expected import why_expected
from tests.support.tiny_models import tiny, tiny_batch


def entries_expected(model: torch.nn.Module) -> dict[str, str]:
    reasons = {held.site.label: why_expected(held, model, ()) for held in patched_sites() if held.site.described}
    return {label: reason for label, reason in reasons.items() if reason is not None}


@pytest.mark.parametrize("attention", ["sdpa", "npu", "eager"])
def test_the_attention_that_the_configuration_names_is_expected(attention: str, npu: torch.device) -> None:
    model = tiny("qwen3_moe").to(npu)
    report = npu_patch.apply(model)
    model.set_attn_implementation(attention)
    expected = entries_expected(model)
    experts = {each.site: f"{each.layers} live layers" for each in report.patched if each.patch == "experts"}
    used = {label: reason for label, reason in experts.items() if not reason.startswith("0")}
    assert len(used) == 1 < len(experts)
    why = {f"AttentionInterface[{attention!r}]": f"the model's attention implementation is {attention}"}
    assert expected == used | (why if attention != "eager" else {})


def test_experts_of_a_registry_are_recomputed_in_float64_by_their_own_forward(npu: torch.device) -> None:
    model = tiny("qwen3_moe").to(npu)
    npu_patch.apply(model)
    (held,) = (each for each in patched_sites() if each.outcome.patch == "experts" and each.outcome.layers)
    with recorded([held]) as recording:
        model(input_ids=tiny_batch()["input_ids"].to(npu))
    call = recording.of(held)[0]
    exact, original = run_in_float64(held, call).tensors, run_original(held, call).tensors
    assert exact.keys() == original.keys() and all(torch.isfinite(each).all() for each in exact.values())
    assert torch.allclose(exact["output 0"], original["output 0"], atol=1e-6)
    assert not torch.equal(exact["output 0"], original["output 0"])  # float32 is not the truth
