"""python -m npu_patch bench: what is measured, how, and that the simulated NPU claims no times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from npu_patch.commands import main
from npu_patch.commands.console.terminal import Steps
from tests.support.needs_triton import needs_triton

pytestmark = pytest.mark.usefixtures("leaving_nothing_applied")


def test_on_the_simulated_npu_launches_are_counted_and_no_time_is_shown(
    simulated: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "bench.png"
    assert main(["bench", "qwen3", "--png", str(picture)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "its times mean nothing and are not shown" in text and "simulated counts" in text
    assert "launches unpatched" in text and "MB unpatched" in text
    assert "LoRA, r=16" in text and "Qwen3RMSNorm" in text and "ms" not in text.split()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "qwen3", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    step = content["results"][-1]
    assert (step["patch"], step["patched"], step["original"]) == ("step", None, None)
    assert step["launches"][0] < step["launches"][1] and step["gain"] > 1.2
    norms = [each for each in content["results"] if each["patch"] == "rms_norm"]
    assert {each["shapes"] for each in norms} >= {"48 bfloat16, 1x64x48 bfloat16", "16 bfloat16, 1x64x6x16 bfloat16"}


def test_elsewhere_times_are_medians_with_their_spread(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "llama", "--device", "cpu", "--samples", "4", "--dtype", "float32", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["note"] is None and content["chip"] == "cpu"
    assert {each["patch"] for each in content["results"]} >= {"rms_norm", "rope", "swiglu", "step"}
    for each in content["results"]:
        for timing in (each["patched"], each["original"]):
            assert 0 < timing["low"] <= timing["median"] <= timing["high"]
        assert each["gain"] == pytest.approx(each["original"]["median"] / each["patched"]["median"])


@needs_triton
@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_an_operator_called_with_heads_that_wait_for_their_norm_is_not_measured_alone(
    family: str, npu: torch.device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKLE_NPU_TRITON", "1")
    assert main(["bench", family, "--samples", "1", "--tokens", "4", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert {"qk_norm_rope", "rms_norm", "step"} <= {each["patch"] for each in results}
    assert "rope" not in {each["patch"] for each in results}
    assert not any(each["failure"] for each in results)


def test_an_operator_that_raises_is_named_and_the_others_are_measured(
    simulated: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.ops.npu, "npu_rms_norm", broken)
    assert main(["bench", "qwen3", "--tokens", "8"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "FAILED: rms_norm Qwen3RMSNorm, 48 bfloat16, 1x8x48 bfloat16: raises RuntimeError: no such kernel" in text
    assert "FAILED: step LoRA, r=16, 1x8 tokens: raises RuntimeError: no such kernel" in text
    assert "swiglu Qwen3MLP" in text and "FAILED: swiglu" not in text


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_progress_counts_every_measurement(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = {"total": 0, "done": 0}
    monkeypatch.setattr(Steps, "of", lambda self, total: counted.update(total=total))
    monkeypatch.setattr(Steps, "done", lambda self: counted.update(done=counted["done"] + 1))
    options = ["--device", "cpu", "--dtype", "float32", "--samples", "5", "--tokens", "8", "--json"]
    assert main([command, "llama", *options, *(["--output", str(tmp_path / "x")] if command == "tune" else [])]) == 0
    content = json.loads(capsys.readouterr().out)
    results = content["results"] if command == "bench" else content["decisions"]
    assert counted["done"] == counted["total"] >= len(results) >= 3


@pytest.mark.parametrize("command", ["bench", "tune"])
def test_switched_off_there_is_nothing_to_measure(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKLE_NPU_PATCH", "0")
    output = ["--output", str(tmp_path / "x")] if command == "tune" else []
    assert main([command, "qwen3", "--device", "cpu", *output]) == 2
    assert "TWINKLE_NPU_PATCH switches everything off" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qwen-3"], "MODEL 'qwen-3' is no model type"),
        (["qwen3", "--tokens", "0"], "--tokens 0: accepted are numbers from 1"),
        (["qwen3", "--samples", "-2"], "--samples -2: accepted are numbers from 1"),
        (["qwen3", "--png", "/no/such/folder/x.png"], "--png /no/such/folder/x.png: there is no folder"),
    ],
)
def test_bad_usage_is_told_what_is_accepted(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert main(["bench", "qwen3", "--png", "x.png"]) == 2
    assert "pip install 'npu_patch[cli]'" in capsys.readouterr().err
