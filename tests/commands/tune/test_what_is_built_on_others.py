"""tune for what computes several functions or several calls at once: timed in the layer around it, decided only where
one way is clearly faster, followed by every path of apply(), and never another result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import npu_patch
from npu_patch.commands import main
from npu_patch.commands.subject.lora_step import RANK, with_adapters
from npu_patch.commands.subject.tiny_model import tiny_model
from npu_patch.commands.tune import command as tune
from npu_patch.measuring.in_turns import Timing
from npu_patch.ops import add_rms_norm, qk_norm_rope
from npu_patch.patches import CATALOGUE
from npu_patch.probe import gated_delta_checks
from npu_patch.reporting.outcome import Outcome
from npu_patch.serving.implementation import Implementation
from tests.support.gated_delta_stand_ins import install_mindspeed
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.parity import apart
from tests.support.tiny_models import tiny_batch

ONE = {name: tensor[:1] for name, tensor in tiny_batch().items()}
OWN, MINDSPEED = "torch, float32", "MindSpeed chunk_gated_delta_rule"


def adapted(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return with_adapters(tiny_model(family), r=RANK, target_modules="all-linear", init_lora_weights=False)


class Products(TorchDispatchMode):
    """How many are computed within."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._schema.name in ("aten::mm", "aten::addmm", "aten::linear")
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Kind:
    """`name`: of the way beside the original. `run`: what is offered under that name, if there is none on a CPU."""

    patch: str
    around: str
    name: str = "another"
    run: Callable[..., Any] | None = None
    made: Callable[[str], torch.nn.Module] = tiny_model
    options: tuple[str, ...] = ()


def _add_norm(variant: Any, x: Any, weight: Any, eps: float, *rest: Any) -> Any:
    return variant.reference(x, weight, eps)


KINDS = [
    Kind("qk_norm_rope", "Qwen3Attention", run=qk_norm_rope.reference),
    Kind("add_rms_norm", "Qwen3Attention in Qwen3DecoderLayer", run=add_rms_norm.one_after_the_other(_add_norm)),
    Kind("lora", "Linear in Qwen3MLP", "one function", made=adapted, options=("--lora",)),
]
Timed = Callable[[Mapping[str, float]], None]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Timed:
    """Takes the times from a table instead of a clock; each form runs, as it would."""

    def by(table: Mapping[str, float]) -> None:
        def times(forms: Mapping[str, Callable[[], None]], *_: Any, **__: Any) -> dict[str, Timing]:
            for form in forms.values():
                form()
            found = {name: table.get(name, 5.0) for name in forms}
            return {name: Timing(ms, ms - 0.01, ms + 0.01, None) for name, ms in found.items()}

        monkeypatch.setattr(tune, "in_turns", times)

    return by


@pytest.fixture(params=KINDS, ids=lambda kind: kind.patch)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    found: Kind = request.param
    if found.run is not None:
        offered = Implementation(found.name, ("cpu",), found.run, lambda *call: None)
        catalogue = tuple(
            replace(each, op=replace(each.op, implementations=(offered,)), switch="patch")
            if each.name == found.patch
            else each
            for each in CATALOGUE
        )
        monkeypatch.setattr(tune, "CATALOGUE", catalogue)
        monkeypatch.setattr("npu_patch.applying.api.CATALOGUE", catalogue)
    return found


def tuned(kind: Kind, file: Path) -> dict[str, Any]:
    arguments = ["tune", "qwen3", "--device", "cpu", "--dtype", "float32", "--samples", "5", "--tokens", "13"]
    assert main([*arguments, *kind.options, "--output", str(file)]) == 0
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def of(report: npu_patch.Report, patch: str) -> list[Outcome]:
    return [each for each in report if each.patch == patch and (each.calls.ran or each.calls.fell_through)]


def applied_to(kind: Kind, order: str) -> tuple[npu_patch.Report, torch.nn.Module]:
    if order == "the model":
        model = kind.made("qwen3")
        return npu_patch.apply(model, device="cpu"), model
    report = npu_patch.apply(device="cpu")
    return report, kind.made("qwen3")


@pytest.mark.parametrize("order", ["the model", "no model yet"])
@pytest.mark.parametrize("winner", ["original", "the other", "neither"])
def test_the_faster_way_is_taken_in_every_order_and_the_report_says_by_how_much(
    winner: str, order: str, kind: Kind, timed: Timed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = loss_and_gradients(kind.made("qwen3"), ONE)
    other, original = {"original": (2.6, 2.0), "the other": (1.0, 2.0), "neither": (2.0, 2.0)}[winner]
    timed({kind.name: other, "original": original})
    file = tmp_path / "tuned.json"
    decided = [each for each in tuned(kind, file)["decisions"] if each["patch"] == kind.patch]
    choice = {"original": "original", "the other": kind.name, "neither": None}[winner]
    assert {each["choice"] for each in decided} == ({choice} if choice else set())
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(file))
    report, model = applied_to(kind, order)
    assert not report.warnings and not report.failed
    assert apart(loss_and_gradients(model, ONE), expected) == {}
    ran = of(report, kind.patch)
    if winner == "original":
        reasons = {each.reason for each in report if each.patch == kind.patch and each.status == "skipped"}
        assert ran == [] and "tuned: original faster, 1.3 x" in reasons
        assert "tuned: original faster, 1.3 x" in str(report)
        return
    assert sum(each.calls.ran for each in ran) > 0 and not any(each.calls.fell_through for each in ran)
    assert (sum(each.calls.tuned for each in ran) > 0) == (winner == "the other")
    assert (f"tuned: {kind.name} faster, 2.0 x" in " ".join(str(report).split())) == (winner == "the other")


@pytest.mark.parametrize("mode", ["training", "no_grad", "inference_mode"])
def test_an_original_that_is_decided_for_some_shapes_alone_is_no_error_and_no_other_result(
    mode: str, kind: Kind, timed: Timed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site stays bound, for the other shapes; a layer whose parts wait does not run twice."""
    timed({kind.name: 2.6, "original": 2.0})
    file = tmp_path / "tuned.json"
    content = tuned(kind, file)
    unseen = next({**each, "choice": kind.name} for each in content["decisions"] if each["patch"] == kind.patch)
    unseen["signature"] = [["torch.float32", [2, 1024, 7]]]
    content["decisions"].append(unseen)
    file.write_text(json.dumps(content))
    model = kind.made("qwen3").train(mode == "training")
    around = {"training": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    with around(), Products() as unpatched:
        expected = model(**ONE).loss
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(file))
    report = npu_patch.apply(model, device="cpu", loss=False)  # which has products of its own
    with around():
        with Products() as patched:
            found = model(**ONE).loss
        longer = model(**tiny_batch(batch=1, length=40)).loss  # another bucket: as without the file
    assert relative_error(found.double(), expected.double()) < 1e-6 and longer.isfinite()
    outcomes = of(report, kind.patch)
    passed_on = {why for each in outcomes for why in each.calls.fell_through}
    assert passed_on == {"tuned: original faster, 1.3 x"}
    assert sum(each.calls.ran for each in outcomes) > 0
    assert patched.count == unpatched.count > 0


def test_parts_that_are_left_to_the_original_are_there_for_what_is_built_on_them(
    kind: Kind, timed: Timed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind.patch == "lora":
        pytest.skip("built on no other patch")
    timed({kind.name: 1.0, "original": 2.0})
    file = tmp_path / "tuned.json"
    parts = {each["choice"] for each in tuned(kind, file)["decisions"] if each["patch"] in ("rms_norm", "rope")}
    assert parts == {"original"}
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(file))
    model = tiny_model("qwen3")
    report = npu_patch.apply(model, device="cpu")
    loss_and_gradients(model, ONE)
    assert sum(each.calls.ran for each in of(report, kind.patch)) == 2
    (norm,) = of(report, "rms_norm")
    assert set(norm.calls.fell_through) <= {"tuned: original faster, 2.5 x"} and not norm.calls.ran


@pytest.mark.parametrize(("dtype", "off"), [("float32", 1.001), ("bfloat16", 1.05)])
def test_a_way_that_is_wrong_in_its_layer_is_refused(
    dtype: str,
    off: float,
    kind: Kind,
    timed: Timed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if kind.run is None:
        pytest.skip("the genuine one")
    genuine = kind.run

    def slightly_off(*call: Any) -> Any:
        first, second = genuine(*call)
        return first * off, second

    for place in (tune, npu_patch.applying.api):
        patches = [
            replace(each, op=replace(each.op, implementations=(replace(each.op.implementations[0], run=slightly_off),)))
            if each.name == kind.patch
            else each
            for each in place.CATALOGUE
        ]
        monkeypatch.setattr(place, "CATALOGUE", tuple(patches))
    timed({kind.name: 0.1, "original": 2.0})
    file = tmp_path / "tuned.json"
    arguments = ["tune", "qwen3", "--device", "cpu", "--dtype", dtype, "--samples", "5", "--tokens", "13"]
    assert main([*arguments, "--output", str(file)]) == 1
    assert f"REFUSED: another for {kind.around}" in " ".join(capsys.readouterr().out.split())
    assert not [each for each in json.loads(file.read_text())["decisions"] if each["patch"] == kind.patch]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [KINDS[1]], indirect=True, ids=lambda kind: kind.patch)
def test_a_layer_whose_experts_depend_on_a_rounding_is_judged_all_the_same(
    dtype: str, kind: Kind, timed: Timed, tmp_path: Path
) -> None:
    timed({kind.name: 1.0, "original": 2.0})
    file = tmp_path / "tuned.json"
    arguments = ["tune", "qwen3_moe", "--device", "cpu", "--dtype", dtype, "--samples", "5", "--tokens", "13"]
    main([*arguments, "--output", str(file)])
    found = [each["choice"] for each in json.loads(file.read_text())["decisions"] if each["patch"] == kind.patch]
    assert found == [kind.name]


@pytest.mark.parametrize("fast", [MINDSPEED, OWN, "original"])
def test_the_provider_of_a_gated_delta_rule_is_the_one_that_was_fastest(
    fast: str, npu: torch.device, timed: Timed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gated_delta_checks, "VERDICTS", {})
    rule = install_mindspeed(monkeypatch, "npu_chunk_gated_delta_rule")
    timed({fast: 1.0, **({} if fast == "original" else {"original": 2.0})})
    file = tmp_path / "tuned.json"
    main(["tune", "qwen3_5", "--dtype", "bfloat16", "--samples", "5", "--tokens", "13", "--output", str(file)])
    every = [each for each in json.loads(file.read_text())["decisions"] if "over chunks" in each["variant"]]
    assert [each["choice"] for each in every] == [fast]
    assert set(every[0]["measured"]) == {"original", MINDSPEED, OWN}
    model = tiny_model("qwen3_5").bfloat16().to(npu)
    expected = loss_and_gradients(model, ONE)
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(file))
    report = npu_patch.apply(model)
    rule.calls = 0
    found = loss_and_gradients(model, ONE)
    assert relative_error(found["loss"], expected["loss"]) < 2.0**-7
    (outcome,) = [each for each in report if each.patch == "gated_delta_net" and "chunk" in each.site and each.layers]
    gain = 5.0 if fast == "original" else 2.0
    said = outcome.reason if fast == "original" else outcome.tuned
    assert said == f"tuned: {fast} faster, {gain} x"
    assert dict(outcome.calls.ran_by) == ({} if fast == "original" else {fast: 1})
    assert (rule.calls > 0) == (fast == MINDSPEED)
