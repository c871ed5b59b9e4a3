"""python -m npu_patch verify: right where the patches are, and where it says that one is wrong, in which way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_patch.commands import main
from tests.support.needs_triton import needs_triton
from tests.support.tiny_models import tiny

pytestmark = pytest.mark.usefixtures("leaving_nothing_applied")
OP = torch.ops.npu


def test_a_sound_model_is_verified(npu: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "qwen3", "--seeds", "2"]) == 0
    text = capsys.readouterr().out
    assert "Qwen3RMSNorm: weight" in text and "float32" in text and "bfloat16" in text
    assert "FAIL" not in text and " checked and within their bars, " in text and " not used by this model" in text


def test_gated_delta_nets_and_experts_train_and_decode(npu: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "qwen3_5_moe", "--seeds", "2", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    compared = {(check["patch"], check["site"].rsplit(".", 1)[-1]) for check in checks if check["compared"]}
    assert {
        ("gated_delta_net", "torch_chunk_gated_delta_rule"),
        ("gated_delta_net", "torch_recurrent_gated_delta_rule"),
        ("gated_delta_net", "causal_conv1d_update"),
        ("experts", "ExpertsInterface['grouped_mm']"),
        ("attention", "AttentionInterface['sdpa']"),
    } <= compared
    assert all(check["error"] < 0.02 for check in checks if check["compared"])


def test_a_stored_model_is_verified(npu: torch.device, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama").save_pretrained(tmp_path)
    assert main(["verify", str(tmp_path), "--dtype", "float32", "--seeds", "1", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["model"] == str(tmp_path)
    assert {check["dtype"] for check in content["checks"]} == {"float32"}


def off_in_value(genuine: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, gamma, epsilon: genuine(x, gamma * 1.0001, epsilon=epsilon)


def off_in_gradient(genuine: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, ...]:
        y, *others = genuine(x, gamma, epsilon=epsilon)
        return y * 1.001 - (y * 0.001).detach(), *others

    return run


def not_a_number(genuine: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, ...]:
        y, *others = genuine(x, gamma, epsilon=epsilon)
        return y * float("nan"), *others

    return run


def raises(genuine: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, ...]:
        raise RuntimeError("no such kernel in libopapi.so")

    return run


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (off_in_value, "gradient of weight is 1.00e-04 from float64, the original"),
        (off_in_gradient, "gradient of weight is 1.00e-03 from float64"),
        (not_a_number, "output 0 is inf from float64"),
        (raises, "raises RuntimeError: no such kernel in libopapi.so, for 48 float32, 2x29x48 float32"),
        (raises, "raises where the unpatched model does not: RuntimeError: no such kernel in libopapi.so"),
    ],
)
def test_a_wrong_kernel_is_named_with_where_and_by_how_much(
    broken: Callable[..., Any],
    said: str,
    npu: torch.device,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OP, "npu_rms_norm", broken(OP.npu_rms_norm))
    assert main(["verify", "qwen3", "--dtype", "float32", "--seeds", "1"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert said in text
    assert "FAIL: float32 rms_norm transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm.forward:" in text
    if broken is raises:
        assert "FAIL: float32 swiglu" not in text and "never ran" not in text and "nothing in this model" not in text
    else:
        assert ("FAIL: float32 swiglu" in text) == (broken is not_a_number)
    if broken is not_a_number:
        assert "swiglu" in text and "cannot be judged: it is given NaN, by something patched before it" in text


def test_a_kernel_that_rounds_twice_as_much_is_seen_in_bfloat16(
    npu: torch.device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = OP.npu_rms_norm

    def coarse(x: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, ...]:
        y, *others = genuine(x, gamma, epsilon=epsilon)
        return (y * 1.004 if y.dtype == torch.bfloat16 else y), *others

    monkeypatch.setattr(OP, "npu_rms_norm", coarse)
    assert main(["verify", "qwen3", "--dtype", "bfloat16", "--seeds", "1"]) == 1
    assert "times as far from float64 as the original" in " ".join(capsys.readouterr().out.split())


def test_a_site_that_never_runs_is_a_failure(
    npu: torch.device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patched, with live layers, and every call falls through."""
    monkeypatch.setattr("npu_patch.patches.rope.bind", lambda *given: None)
    assert main(["verify", "qwen3", "--dtype", "float32", "--seeds", "1"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "apply_rotary_pos_emb: patched, but never ran in training or decoding (Qwen3Attention calls it;" in text
    assert "fell through: arguments that the function does not name" in text


def test_nothing_patched_is_a_failure(
    npu: torch.device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKLE_NPU_PATCH", "0")
    assert main(["verify", "qwen3", "--dtype", "float32", "--seeds", "1"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "nothing in this model is patched; switched off by TWINKLE_NPU_PATCH" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qwen-3"], "MODEL 'qwen-3' is no model type of the installed transformers; near names: qwen3,"),
        (["qwen3", "--device", "gpu"], "--device gpu: accepted are npu, cuda, cpu"),
        (["qwen3", "--device", "cuda"], "--device cuda: torch.cuda.is_available() is False"),
        (["qwen3", "--seeds", "0"], "--seeds 0: accepted are numbers from 1"),
        (["tests"], "MODEL tests: the folder has no config.json"),
    ],
)
def test_bad_usage_is_told_what_is_accepted(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err


@needs_triton
@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_an_attention_layer_with_a_cache_is_judged_alone(
    family: str, npu: torch.device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its replacement is called with the cache of the model, which every call of it extends."""
    monkeypatch.setenv("TWINKLE_NPU_TRITON", "1")
    assert main(["verify", family, "--dtype", "float32", "--seeds", "1", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    (heads,) = [each for each in checks if each["patch"] == "qk_norm_rope"]
    assert heads["status"] == "ok" and heads["compared"] > 10
