"""A report that is read after training: what was made and ran stands first, what never ran last, and what to do."""

from __future__ import annotations

import copy
import json
import re
from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model

import npu_patch
from npu_patch.reporting.actions import ACTIONS, what_to_do
from npu_patch.reporting.outcome import FAILED, PATCHED, SKIPPED, Outcome
from npu_patch.reporting.report import Report
from npu_patch.reporting.rows import rows, short_name
from npu_patch.serving.calls import Calls
from tests.support.gradients import loss_and_gradients
from tests.support.tiny_models import tiny, tiny_batch


def norms(report: Report) -> dict[str, int | None]:
    return {short_name(o.site): o.reached for o in report if o.patch == "rms_norm" and o.reached is not None}


def test_without_a_model_layers_are_counted_as_they_are_made(npu: torch.device) -> None:
    tiny("qwen3"), tiny("llama")
    report = npu_patch.apply()
    assert norms(report) == {}
    model = tiny("qwen3").to(npu)
    assert norms(report) == {"Qwen3RMSNorm": 9}
    (row,) = [each for each in rows(report) if "Qwen3RMSNorm" in each.names]  # beside others of its kind perhaps
    assert (row.layers, row.ran) == (9, 0) and not row.fell_through
    tiny("qwen3"), tiny("llama")
    assert norms(report) == {"Qwen3RMSNorm": 18, "LlamaRMSNorm": 5} == norms(npu_patch.report())
    loss_and_gradients(model, tiny_batch())
    (entry,) = [each for each in json.loads(report.json())["outcomes"] if "Qwen3RMSNorm" in each["site"]]
    assert (entry["layers"], entry["ran"]) == (18, 9)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda model: get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")),
        lambda model: torch.nn.ModuleList(model.modules()),
        copy.deepcopy,
    ],
    ids=["peft", "registered again", "copied"],
)
def test_a_layer_is_counted_once_whoever_holds_it(wrapped: object, npu: torch.device) -> None:
    tiny("qwen3")
    report = npu_patch.apply()
    model = tiny("qwen3")
    wrapped(model)
    assert norms(report) == {"Qwen3RMSNorm": 9}


def test_a_given_models_layers_are_not_mixed_with_those_made_since(npu: torch.device) -> None:
    report = npu_patch.apply(tiny("qwen3").to(npu))
    tiny("qwen3")
    assert norms(report) == {"Qwen3RMSNorm": 9}


def of(patch: str, name: str, status: str = PATCHED, **calls: object) -> Outcome:
    return Outcome(patch, f"transformers.models.qwen3.modeling_qwen3.{name}", status, "so", calls=Calls(**calls))


def test_what_ran_stands_first_and_what_was_never_called_last_and_folded() -> None:
    outcomes = [
        of("rms_norm", "Qwen3IdleNorm.forward"),
        of("rms_norm", "Qwen3OddNorm.forward", SKIPPED),
        *(of("rms_norm", f"Qwen3Idle{index}.forward") for index in range(3)),
        of("rope", "apply_rotary_pos_emb", fell_through=Counter({"tensor subclass": 2})),
        of("swiglu", "Qwen3MLP.forward", ran=4),
        of("swiglu", "Qwen3Broken.forward", FAILED),
        of("attention", "Qwen3Idle.forward"),
    ]
    found = [(row.patch, row.status, row.never_called, len(row.sites)) for row in rows(outcomes)]
    assert found == [
        ("rope", "patched", False, 1),
        ("swiglu", "patched", False, 1),
        ("rms_norm", "skipped", False, 1),
        ("swiglu", "failed", False, 1),
        ("rms_norm", "patched", True, 4),
        ("attention", "patched", True, 1),
    ]
    text = str(Report("npu", outcomes))
    assert "rms_norm          never called: Qwen3IdleNorm and 3 more  " in text
    assert max(map(len, text.splitlines())) <= 100
    assert Report("npu", outcomes).to_html().count("never called") == 2


def test_before_anything_was_called_nothing_is_folded() -> None:
    found = rows([of("rms_norm", "Qwen3RMSNorm.forward"), of("swiglu", "Qwen3MLP.forward")])
    assert [row.never_called for row in found] == [False, False]


@pytest.mark.parametrize(
    ("site", "name"),
    [
        ("transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm.forward", "Qwen3RMSNorm"),
        ("transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeRMSNorm.forward", "Qwen3MoeRMSNorm"),
        ("transformers.models.qwen3_moe.modeling_qwen3_moe.apply_rotary_pos_emb", "apply_rotary_pos_emb (qwen3_moe)"),
        ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2MLP.forward", "Qwen2MLP (qwen2_5_vl)"),
        ("AttentionInterface['sdpa']", "AttentionInterface['sdpa']"),
        ("trl.trainer.utils.selective_log_softmax", "selective_log_softmax"),
    ],
)
def test_a_name_says_its_family(site: str, name: str) -> None:
    assert short_name(site) == name


@pytest.mark.parametrize(("pattern", "action"), ACTIONS)
def test_a_reason_that_a_user_can_act_on_is_one_that_the_package_gives(pattern: str, action: str) -> None:
    """Its words are found in the sources: a reason that is reworded takes its row along."""
    from pathlib import Path

    package = Path(npu_patch.__file__).parent
    sources = [file.read_text() for file in package.rglob("*.py") if "reporting" not in file.parts]
    words = re.sub(r"\\b|\^|\||\(|\)", "\n", pattern).split("\n")
    computed = {"on cpu": "on {", "float64": "dtype {"}  # the device and the dtype are filled in
    assert any(any(computed.get(word, word) in source for source in sources) for word in words if word)


@pytest.mark.parametrize(
    ("reason", "action"),
    [
        ("input on cpu", "put the model and its inputs on the device"),
        ("input of dtype torch.float64, 2 dimensions, 6 wide", "load the model in bfloat16, float16 or float32"),
        ("hooks on act_fn", "remove those hooks where they are not needed"),
        ("tensor subclass", None),
        ("0 elements", None),
    ],
)
def test_what_to_do_about_a_reason(reason: str, action: str | None) -> None:
    assert what_to_do(reason) == action


def test_the_report_carries_the_action_in_each_of_its_forms(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    report = npu_patch.apply(model)
    model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *call: None)
    loss_and_gradients(model, tiny_batch())
    said = "hooks on act_fn (remove those hooks where they are not needed)"
    assert said in " ".join(str(report).split()) and f"1 x {said}" in report.to_html()
    (mlp,) = [each for each in json.loads(report.json())["outcomes"] if each["patch"] == "swiglu"]
    assert mlp["actions"] == {"hooks on act_fn": "remove those hooks where they are not needed"}
