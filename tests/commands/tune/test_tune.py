"""python -m npu_patch tune, and apply() under the file it writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import npu_patch
from npu_patch.applying.state import patched_sites
from npu_patch.commands import main
from npu_patch.commands.subject.tiny_model import tiny_model
from npu_patch.commands.tune import command as tune
from npu_patch.measuring import tuning
from npu_patch.measuring.in_turns import Timing
from npu_patch.measuring.measured_on import here
from npu_patch.ops.swiglu import SWIGLU
from npu_patch.patches import CATALOGUE, swiglu
from npu_patch.serving.implementation import Implementation
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.parity import apart
from tests.support.tiny_models import tiny_batch

USUAL = "torch, float32"
CPU = ("--device", "cpu", "--dtype", "float32", "--samples", "5")


def implementation(name: str, run: Callable[[torch.Tensor], torch.Tensor]) -> Implementation:
    """Of SwiGLU, from a function of gate and up in one tensor."""
    return Implementation(name, ("cpu", "npu"), lambda *tensors: run(torch.cat(tensors, -1)), lambda *tensors: None)


def right(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def timing(median: float | tuple[float, float, float]) -> Timing:
    """Of a median, or of a low, a median and a high."""
    low, middle, high = median if isinstance(median, tuple) else (median - 1e-4, median, median + 1e-4)
    return Timing(middle, low, high, None)


WRONG = {
    "fast and wrong": lambda gate_up: gate_up.chunk(2, -1)[0],
    "fast with a wrong gradient": lambda gate_up: right(gate_up.detach()) + 0 * gate_up.chunk(2, -1)[0],
    "fast and slightly wrong": lambda gate_up: right(gate_up) * 1.00001,
}


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Offers further implementations of SwiGLU, and takes the times from a table instead of a clock."""

    def offer(times: Mapping[str, float | tuple[float, float, float]], *more: Implementation) -> None:
        patch = replace(swiglu.PATCH, op=replace(SWIGLU, implementations=(*SWIGLU.implementations, *more)))
        catalogue = tuple(patch if each.name == "swiglu" else each for each in CATALOGUE)
        monkeypatch.setattr("npu_patch.commands.tune.command.CATALOGUE", catalogue)
        monkeypatch.setattr("npu_patch.applying.api.CATALOGUE", catalogue)
        monkeypatch.setattr(
            tune, "in_turns", lambda forms, device, samples, peaks: {n: timing(times.get(n, 5.0)) for n in forms}
        )

    return offer


def decisions(path: Path, patch: str = "swiglu") -> list[dict[str, Any]]:
    return [each for each in json.loads(path.read_text())["decisions"] if each["patch"] == patch]


@pytest.mark.parametrize("name", WRONG)
def test_what_is_fast_and_wrong_is_refused(
    name: str, offered: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offered({name: 0.001}, implementation(name, WRONG[name]))
    file = tmp_path / "tuned.json"
    assert main(["tune", "qwen3", *CPU, "--output", str(file)]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert f"REFUSED: {name} for Qwen3MLP, 1x64x48 float32:" in text and "from float64" in text
    (decision,) = decisions(file)
    assert decision["choice"] != name and "from float64" in decision["measured"][name]["wrong"]
    assert decision["measured"][name]["seconds"] is None


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"original": 3.0, USUAL: 2.0, "another": 1.0}, "another"),
        ({"original": 3.0, USUAL: 2.0, "another": 4.0}, USUAL),
        ({"original": 1.0, USUAL: 2.0, "another": 4.0}, "original"),
        ({"original": 1.0, USUAL: 1.0, "another": 1.0}, "original"),
        ({"original": (2.0, 3.0, 4.0), "another": (1.0, 1.5, 2.0)}, "original"),
        ({"original": (2.0, 3.0, 4.0), "another": (1.0, 1.5, 1.9)}, "another"),
        ({"original": (2.0, 3.0, 4.0), USUAL: (1.0, 1.2, 2.5), "another": (1.0, 1.5, 1.9)}, "another"),
    ],
)
def test_the_fastest_right_way_is_what_apply_then_takes(
    times: dict[str, float | tuple[float, float, float]],
    chosen: str,
    offered: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    offered(times, implementation("another", right))
    file = tmp_path / "tuned.json"
    assert main(["tune", "qwen3", *CPU, "--tokens", "13", "--output", str(file)]) == 0
    assert f"use it with TWINKLE_NPU_TUNE={file}" in "".join(capsys.readouterr().out.split("\n"))
    assert [each["choice"] for each in decisions(file)] == [chosen]
    model = tiny_model("qwen3")
    of_one = {name: tensor[:1] for name, tensor in tiny_batch().items()}
    original = loss_and_gradients(model, of_one)
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(file))
    report = npu_patch.apply(model, device="cpu")
    assert not report.warnings
    found = loss_and_gradients(model, of_one)
    assert apart(found, original) == {}
    assert f"tuningfile{file}:" in "".join(str(report).split())  # whose lines end where a path has a hyphen
    (outcome,) = [each for each in report if each.patch == "swiglu"]
    if chosen == "original":
        assert outcome.status == "skipped" and outcome.reason.startswith("tuned: original")
        assert not hasattr(type(model.model.layers[0].mlp).forward, "__wrapped__")
        return
    assert (outcome.calls.ran, outcome.calls.tuned, outcome.calls.fell_through) == (2, 2, {})
    assert dict(outcome.calls.ran_by) == ({"another": 2} if chosen == "another" else {})
    loss_and_gradients(model, tiny_batch())  # shapes that the file does not know go where they went
    assert (outcome.calls.ran, outcome.calls.tuned) == (4, 2)
    npu_patch.restore()
    assert not hasattr(type(model.model.layers[0].mlp).forward, "__wrapped__")


def test_wide_and_narrow_layers_of_one_class_are_decided_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A dense feed-forward layer and a shared expert are given the same tensors."""
    monkeypatch.setattr("npu_patch.commands.tune.command.CATALOGUE", (swiglu.PATCH,))
    winners = iter(["original", USUAL])

    def times(forms: Mapping[str, Any], device: torch.device, samples: int, peaks: bool) -> dict[str, Timing]:
        winner = next(winners)
        return {name: timing(1.0 if name == winner else 2.0) for name in forms}

    monkeypatch.setattr(tune, "in_turns", times)
    file = tmp_path / "tuned.json"
    assert main(["tune", "glm4_moe", *CPU, "--tokens", "13", "--output", str(file)]) == 0
    assert [each["choice"] for each in decisions(file)] == ["original", USUAL]
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(file))
    model = tiny_model("glm4_moe")
    report = npu_patch.apply(model, device="cpu")
    loss_and_gradients(model, {name: tensor[:1] for name, tensor in tiny_batch().items()})
    (outcome,) = [each for each in report.patched if each.patch == "swiglu"]
    assert (outcome.calls.ran, sum(outcome.calls.fell_through.values())) == (1, 1)


def test_packed_sequences_that_are_the_originals_are_not_served_in_another_shape(npu: torch.device) -> None:
    """A call that may reach the op as one of two: what is decided on the first of them is decided."""
    model, length = tiny_model("qwen3").to(npu), 12
    ids = torch.arange(length, device=npu)[None]
    batch = {"input_ids": ids + 4, "position_ids": torch.where(ids < 5, ids, ids - 5), "use_cache": False}
    expected = model(**batch).logits
    report = npu_patch.apply(model)
    (held,) = [each for each in patched_sites(report) if each.outcome.site == "AttentionInterface['sdpa']"]
    held.replacement.dispatch.tuned = asked = tuning.Forced(None)
    model(**batch)
    ((query, *_),) = asked
    assert query[1][0] == 3  # dimensions: `[T, N, D]`
    ran = held.outcome.calls.ran
    held.replacement.dispatch.tuned = dict.fromkeys(asked, "tuned: original")
    assert relative_error(model(**batch).logits.cpu(), expected.cpu()) < 1e-6
    assert held.outcome.calls.ran == ran and held.outcome.calls.fell_through == {"tuned: original": 2}


def test_what_does_not_take_the_shapes_is_no_choice_and_no_fault(offered: Callable[..., None], tmp_path: Path) -> None:
    picky = replace(implementation("picky", right), unsupported=lambda *tensors: "only Thursdays")
    offered({"picky": 0.001}, picky)
    assert main(["tune", "qwen3", *CPU, "--output", str(tmp_path / "tuned.json")]) == 0
    (decision,) = decisions(tmp_path / "tuned.json")
    assert decision["measured"]["picky"]["wrong"] == "does not take it: only Thursdays"
    assert decision["choice"] != "picky"


def test_measured_for_real_it_is_never_slower_than_the_original(tmp_path: Path, npu: torch.device) -> None:
    file = tmp_path / "tuned.json"
    assert main(["tune", "qwen3_moe", "--samples", "5", "--output", str(file)]) == 0
    every = json.loads(file.read_text())["decisions"]
    assert {each["patch"] for each in every} >= {"rms_norm", "rope", "attention", "experts"}
    for each in every:
        low, _ = each["measured"]["original"]["quartiles"]
        assert each["choice"] == "original" or each["measured"][each["choice"]]["quartiles"][1] < low


def written(path: Path, **changes: Any) -> Path:
    tuning.write(path, "npu", [])
    content = json.loads(path.read_text())
    for name, value in changes.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chip": "Ascend910_9391"}, "it was measured on Ascend910_9391, this is "),
        ({"versions": {"torch": "2.1.0"}}, "it was measured with torch 2.1.0, here is"),
        ({"versions": {"triton-ascend": "9.9"}}, "it was measured with triton-ascend 9.9, here is"),
        ({"format": 5}, "its format is 5, this npu_patch reads 6"),
    ],
)
def test_a_file_from_elsewhere_is_refused_with_the_reason(
    changes: dict[str, Any], reason: str, npu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "tuned.json", **changes)
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(file))
    report = npu_patch.apply(tiny_model("qwen3"))
    (warning,) = report.warnings
    assert warning.startswith(f"the tuning file {file} is not used: {reason}")
    assert len(report.patched) > 3


def test_a_simulated_chip_is_not_the_chip_it_is_named_after(simulated: None) -> None:
    assert here(torch.device("npu", 0)).chip == f"simulated {torch.npu.get_device_name(0)}"


@pytest.mark.parametrize(
    "content",
    [
        *(None, "no json", "{}", "[]"),
        *(
            f'{{"format": 6, "chip": "x", {rest}}}'
            for rest in (
                '"versions": {}, "measured": {}, "decisions": 3',
                '"versions": [], "measured": {}, "decisions": []',
                '"versions": {}, "decisions": []',
                '"versions": {}, "measured": {"a case": {"an alternative": 3}}, "decisions": []',
                '"versions": {}, "measured": {}, "decisions": [7]',
                '"versions": {}, "measured": {}, "decisions": [{"patch": "rope", "site": 1}]',
            )
        ),
    ],
)
def test_what_is_no_tuning_file_is_an_error_that_names_it(
    content: str | None, npu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tuned.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(file))
    with pytest.raises(
        ValueError, match=r"TWINKLE_NPU_TUNE='.*tuned.json': accepted is a file that python -m npu_patch"
    ):
        npu_patch.apply(tiny_model("qwen3"))
    assert not npu_patch.report().outcomes


def decision(**changes: Any) -> dict[str, Any]:
    made_up = {"patch": "swiglu", "site": "m.MLP.forward", "variant": "x", "signature": [], "choice": "original"}
    return {**made_up, "measured": {}, **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patch": "teleport"}, "is not used: it decides on teleport; this npu_patch has rms_norm, rope"),
        ({"choice": "magic"}, f"is not used: it chooses magic for swiglu; accepted are original, {USUAL}"),
        ({"choice": "torch_npu.npu_swiglu"}, "it chooses torch_npu.npu_swiglu for swiglu; accepted are original, "),
        (
            {"patch": "cross_entropy"},
            "it decides on cross_entropy, which cannot be tuned; what can is rms_norm, rope, ",
        ),
    ],
)
def test_what_a_file_names_and_is_not_here_is_a_warning(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning.write(tmp_path / "tuned.json", "cpu", [])
    content = json.loads((tmp_path / "tuned.json").read_text())
    (tmp_path / "tuned.json").write_text(json.dumps({**content, "decisions": [decision(**changes)]}))
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(tmp_path / "tuned.json"))
    (warning,) = npu_patch.apply(tiny_model("qwen3"), device="cpu").warnings
    assert said in warning


def test_a_provider_of_another_op_of_the_patch_leaves_the_calls_as_they_were(
    npu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("qwen3_5").to(npu)
    with npu_patch.applied(model) as report:
        (rule,) = [o for o in report if o.patch == "gated_delta_net" and "over chunks" in o.variant and o.layers]
    made = tuning.Decision("gated_delta_net", rule.site, rule.variant, (), "fla causal_conv1d")
    tuning.write(tmp_path / "tuned.json", "npu", [made])
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(tmp_path / "tuned.json"))
    report = npu_patch.apply(model)
    assert not report.failed and "absent here" in report.warnings[0]
    loss_and_gradients(model, tiny_batch())
    (outcome,) = [each for each in report if each.site == rule.site]
    assert outcome.calls.ran > 0


def test_classes_with_the_same_variant_and_shapes_are_decided_apart(tmp_path: Path) -> None:
    made = [
        tuning.Decision("rms_norm", site, "weight", tuning.signature_of(torch.zeros(2, 3)), choice)
        for site, choice in (("a.Norm", "one"), ("b.Norm", "other"))
    ]
    tuning.write(tmp_path / "tuned.json", "cpu", made)
    path = str(tmp_path / "tuned.json")
    assert tuning.followed(path, tuning.content_of(path), "cpu").decisions == made


def test_lengths_in_one_bucket_are_one_and_widths_are_not() -> None:
    signature = tuning.signature_of(torch.zeros(1, 1000, 64))
    assert signature == tuning.signature_of(torch.zeros(2, 512, 64)) == tuning.signature_of(torch.zeros(1, 513, 64))
    others = [torch.zeros(1, 1025, 64), torch.zeros(1, 512, 64), torch.zeros(1, 1000, 63), torch.zeros(1000, 64)]
    assert signature not in [tuning.signature_of(each) for each in (*others, others[0].half())]
    assert tuning.signature_of(torch.tensor(1.0), torch.zeros(3), torch.zeros(0, 2)) == (
        (torch.float32, (0,)),
        (torch.float32, (1, 1, 3)),
        (torch.float32, (2, 1, 2)),
    )


def test_a_length_that_was_not_measured_is_decided_by_one_that_was(
    offered: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered({"original": 3.0, USUAL: 2.0, "another": 1.0}, implementation("another", right))
    file = tmp_path / "tuned.json"
    assert main(["tune", "qwen3", *CPU, "--tokens", "16", "--output", str(file)]) == 0
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(file))
    model = tiny_model("qwen3")
    report = npu_patch.apply(model, device="cpu")
    (outcome,) = [each for each in report if each.patch == "swiglu"]
    for length, tuned in ((9, 2), (12, 4), (8, 4), (17, 4)):
        model(torch.arange(length)[None] + 3)
        assert outcome.calls.tuned == tuned
    assert outcome.calls.ran_by["another"] == 4


def test_shapes_of_one_bucket_that_want_different_ways_get_the_original() -> None:
    made = [
        tuning.Decision("rope", site, "half", tuning.signature_of(torch.zeros(rows, 3)), choice)
        for site, rows, choice in (("a", 5, "one"), ("a", 8, "other"), ("a", 9, "one"), ("b", 5, "one"))
    ]
    assert [each.choice for each in tuning.agreed(made)] == [tuning.ORIGINAL, tuning.ORIGINAL, "one", "one"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tuned.json"
    tuning.write(file, "cpu", [])
    before = file.read_text()

    def full(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        tuning.write(file, "cpu", [tuning.Decision("rope", "m.rotate", "half", (), "original")])
    assert file.read_text() == before and list(tmp_path.iterdir()) == [file]


def test_an_operator_that_raises_is_refused(
    offered: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.nn.functional, "rms_norm", broken)
    offered({})
    assert main(["tune", "qwen3", *CPU, "--tokens", "8", "--output", str(tmp_path / "tuned.json")]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "REFUSED: torch.nn.functional.rms_norm for Qwen3RMSNorm" in text
    assert "raises RuntimeError: no such kernel" in text
    assert {each["choice"] for each in decisions(tmp_path / "tuned.json", "rms_norm")} == {"original"}


def test_bad_usage_is_told_what_is_accepted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["tune", "qwen3", "--output", "/no/such/folder/x.json"]) == 2
    assert "--output /no/such/folder/x.json: there is no folder" in capsys.readouterr().err
    assert main(["tune", "qwen3", "--samples", "4", "--output", "y.json"]) == 2
    assert "--samples 4: accepted are numbers from 5" in capsys.readouterr().err
    monkeypatch.setenv("TWINKLE_NPU_TUNE", "x.json")
    assert main(["tune", "qwen3", "--output", "y.json"]) == 2
    assert "TWINKLE_NPU_TUNE='x.json' is set: unset it" in capsys.readouterr().err
