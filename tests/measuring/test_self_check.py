"""Operators that this device has wrong: found by apply(model), declined with how far they are off, and passed by."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import npu_patch
from npu_patch import log, simulator
from npu_patch.applying import api as lifecycle
from npu_patch.applying.state import patched_sites
from npu_patch.measuring import measure, measurer, self_check
from npu_patch.ops import rms_norm
from npu_patch.patches import rms_norm as rms_norm_patch
from npu_patch.serving.case import Measured
from npu_patch.serving.implementation import Implementation, choose
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.parity import apart
from tests.support.tiny_models import tiny, tiny_batch

pytestmark = pytest.mark.usefixtures("simulated")
NAN = math.nan
Where = Callable[[Mapping[str, Any]], bool]


def everywhere(arguments: Mapping[str, Any]) -> bool:
    return True


def of_group_type(which: int) -> Where:
    return lambda arguments: arguments["group_type"] == which


# Patch, operator, where it is wrong, the family in which it is seen. Backwards are operators of their own.
OPERATORS = {
    "norm": ("rms_norm", "npu_rms_norm", everywhere, "qwen3"),
    "norm, backward": ("rms_norm", "npu_rms_norm_backward", everywhere, "qwen3"),
    "rotation": ("rope", "npu_rotary_mul", everywhere, "qwen3"),
    "partial rotation": ("rope", "npu_rotary_mul", everywhere, "glm4_moe"),
    "SwiGLU": ("swiglu", "npu_swiglu", everywhere, "qwen3"),
    "SwiGLU, backward": ("swiglu", "npu_swiglu_backward", everywhere, "qwen3"),
    "attention": ("attention", "npu_fusion_attention", everywhere, "qwen3"),
    "attention, backward": ("attention", "npu_fusion_attention_grad", everywhere, "qwen3"),
    "windows": ("attention", "npu_fusion_attention", lambda given: given["sparse_mode"] == 4, "mistral"),
    "grouped product": ("experts", "npu_grouped_matmul", of_group_type(0), "qwen3_moe"),
    "grouped product, backward": ("experts", "npu_grouped_matmul", of_group_type(2), "qwen3_moe"),
    "to the experts": ("experts", "npu_moe_token_permute", everywhere, "qwen3_moe"),
    "from the experts": ("experts", "npu_moe_token_unpermute", everywhere, "qwen3_moe"),
    "from the experts, backward": ("experts", "npu_moe_token_unpermute_grad_v2", everywhere, "qwen3_moe"),
}
HOW = {"factor": {"factor": 1.05}, "no number": {"factor": NAN}, "raises": {"error": RuntimeError("aicore exception")}}


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    log.forget()
    monkeypatch.setattr(self_check, "BUDGET_S", 600.0)  # the machine of the tests may be busy
    monkeypatch.setenv("TWINKLE_NPU_SELF_CHECK", "1")
    monkeypatch.setenv("TWINKLE_NPU_TRITON_CACHE", str(tmp_path / "found.json"))
    yield
    npu_patch.restore()


def assert_equals_unpatched(model: torch.nn.Module, original: Mapping[str, torch.Tensor]) -> None:
    found = loss_and_gradients(model, on_npu())
    assert max(relative_error(found[name], original[name]) for name in original) < 1e-5


def on_npu() -> dict[str, torch.Tensor]:
    return {name: tensor.to("npu") for name, tensor in tiny_batch().items()}


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3", "glm4_moe", "qwen3_moe", "qwen3_next"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_operators_that_are_right_serve(family: str, dtype: torch.dtype, npu: torch.device) -> None:
    report = npu_patch.apply(tiny(family).to(npu, dtype))
    assert not [line for line in report.warnings if "wrong" in line] and not report.failed
    assert all(not each.replacement.dispatch.wrong for each in patched_sites() if each.replacement.dispatch)
    found = json.loads(Path(npu_patch.switches.resolve()["triton_cache"]).read_text())["measured"]
    patches = {case.split(":")[0] for case in found}
    assert patches >= {"rms_norm", "rope", "attention"}
    assert ("experts" in patches) == (family in ("glm4_moe", "qwen3_moe", "qwen3_next"))


@pytest.mark.parametrize(
    ("which", "how"),
    [
        *((which, "factor") for which in OPERATORS),
        *((which, how) for which in ("norm", "SwiGLU, backward", "grouped product") for how in ("no number", "raises")),
        ("attention", "raises"),
    ],
)
def test_an_operator_that_is_wrong_is_declined_with_the_numbers_and_the_others_serve(
    which: str, how: str, npu: torch.device
) -> None:
    patch, operator, where, family = OPERATORS[which]
    model = tiny(family).to(npu)
    original = loss_and_gradients(model, on_npu())
    with simulator.wrong_operator(operator, where=where, **HOW[how]):
        report = npu_patch.apply(model)
        assert_equals_unpatched(model, original)
    numbers = "aicore exception" if how == "raises" else "of its size off"
    warned = [line for line in report.warnings if "is wrong on this device" in line]
    assert warned and all(numbers in line for line in warned)
    assert f"{warned[0].split(': ')[0]}: " in str(report).replace("\n  ", " ")
    declined = [
        each for each in report.patched if any("self-check" in why or numbers in why for why in each.declined.values())
    ]
    assert {each.patch for each in declined} >= {patch}
    fell = [why for each in declined for why in each.calls.fell_through]
    assert fell and all("is wrong on this device" in why and numbers in why for why in fell if "wrong" in why)
    others = {each.patch for each in report.patched if each.calls.ran and not each.calls.fell_through}
    assert others >= {"rms_norm", "rope", "attention"} - {each.patch for each in declined}


def test_only_the_width_that_is_wrong_is_declined(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    original = loss_and_gradients(model, on_npu())
    with simulator.wrong_operator("npu_rms_norm", factor=1.01, where=lambda given: given["input"].shape[-1] > 16):
        report = npu_patch.apply(model)
        assert_equals_unpatched(model, original)
    (outcome,) = (each for each in report.patched if each.site.endswith("Qwen3RMSNorm.forward"))
    (why,) = outcome.calls.fell_through
    assert "weight, 48 float32" in why and "the output is 0.01 of its size off" in why
    assert outcome.calls.ran > 0 and outcome.implementation == "torch_npu.npu_rms_norm"


def test_an_outcome_without_any_right_implementation_names_the_original(npu: torch.device) -> None:
    with simulator.wrong_operator("npu_swiglu", factor=1.05):
        report = npu_patch.apply(tiny("qwen3").to(npu))
    (outcome,) = (each for each in report.patched if each.patch == "swiglu" and each.layers)
    assert outcome.implementation == "the original"
    assert "72 float32: self-check: the output is 0.05" in outcome.declined["torch_npu.npu_swiglu"]


def shown_beyond(keys: int, mask: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """As some releases have it: what a mask hides beyond so many keys is seen."""

    def given(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        if arguments[mask] is None:
            return arguments
        shown = arguments[mask].clone()
        shown[..., keys:] = 0
        return {**arguments, mask: shown}

    return given


def generated(model: torch.nn.Module, attention: str = "sdpa") -> torch.Tensor:
    """One token after 599 with padding in the middle of the cache of one row, beyond 512."""
    ids = torch.randint(2, 101, (2, 600), generator=torch.Generator().manual_seed(3)).to("npu")
    mask = torch.ones_like(ids)
    mask[0, 520:590] = 0
    model.set_attn_implementation(attention)
    with torch.no_grad():
        cache = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
        return model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize(
    ("mask", "declined"), [("atten_mask", False), ("pse_shift", True)], ids=["masks", "what is called instead"]
)
def test_a_decode_mask_that_is_forgotten_beyond_512_keys_hides_them_nevertheless(
    mask: str, declined: bool, npu: torch.device
) -> None:
    """Calls are made in the form that is not at risk; where that is wrong too, training's operator decodes."""
    model = tiny("qwen3", max_position_embeddings=1024).to(npu, torch.float16)
    expected = generated(model)
    name = "npu_fused_infer_attention_score"
    with simulator.wrong_operator(name, given=shown_beyond(512, mask)):
        report = npu_patch.apply(model)
        with simulator.count() as counted:
            found = generated(model)
    assert relative_error(found, expected) < 2.0**-7
    warned = [line for line in report.warnings if f"single query, masked by {name}" in line]
    assert bool(warned) == declined == (f"npu::{name}" not in counted.by_op)
    assert not declined or "at a length of 700" in warned[0]
    (outcome,) = (each for each in report.patched if each.site == "AttentionInterface['sdpa']")
    assert outcome.calls.ran and not outcome.calls.fell_through


def test_an_ignored_decode_mask_is_seen_without_the_check_of_its_form(npu: torch.device) -> None:
    """That is, the two tests above would notice."""
    model = tiny("qwen3", max_position_embeddings=1024).to(npu, torch.float16)
    expected = generated(model)
    with simulator.wrong_operator("npu_fused_infer_attention_score", given=shown_beyond(512, "pse_shift")):
        npu_patch.apply(model, self_check=False)
        assert relative_error(generated(model), expected) > 2.0**-7


def test_a_verdict_is_kept_for_the_next_process_and_nothing_runs_again(npu: torch.device, tmp_path: Path) -> None:
    model = tiny("qwen3").to(npu)
    with simulator.wrong_operator("npu_swiglu", factor=1.05):
        first = npu_patch.apply(model)
    assert f"what was found wrong on this device is kept in {tmp_path / 'found.json'}" in first.notes
    npu_patch.restore()
    with simulator.count() as counted:
        second = npu_patch.apply(model)
    assert not counted.launches and second.warnings == first.warnings != []
    third = npu_patch.apply(model)
    assert third.warnings == first.warnings
    npu_patch.restore()
    (tmp_path / "found.json").unlink()
    assert not npu_patch.apply(model).warnings


def test_each_size_is_checked_once_however_many_layers(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    real = measurer.check

    def check(case: measure.Case, *others: Any) -> Measured:
        ran.append(case.title)
        return real(case, *others)

    monkeypatch.setattr(measurer, "check", check)
    npu_patch.apply(tiny("qwen3", num_hidden_layers=5).to(npu))
    assert len(ran) == len(set(ran)) > 10


@pytest.mark.parametrize(
    ("error", "words"), [(torch.OutOfMemoryError("no"), measure.OUT_OF_MEMORY), (RuntimeError("lost"), None)], ids=str
)
def test_accidents_are_no_findings(
    error: Exception, words: str | None, npu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No room, or a device that died of one operator: of that one is known that it does."""
    monkeypatch.setattr(measurer, "answers", lambda device: False)
    with simulator.wrong_operator("npu_rms_norm", error=error), simulator.wrong_operator("npu_rotary_mul", error=error):
        report = npu_patch.apply(tiny("qwen3").to(npu))
    found = json.loads((tmp_path / "found.json").read_text())["measured"]
    wrong = [each["wrong"] for kinds in found.values() for each in kinds.values() if each["wrong"]]
    assert wrong == ([] if words else ["RuntimeError: lost"])
    assert len(report.warnings) == len(wrong)


def test_the_simulated_device_is_checked_where_that_is_asked_for(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TWINKLE_NPU_SELF_CHECK")
    model = tiny("qwen2").to(npu)
    npu_patch.apply(model)
    assert not (tmp_path / "found.json").exists()
    npu_patch.restore()
    monkeypatch.setattr(self_check, "is_simulated", lambda *_: False)  # on a real one it is the other way round
    npu_patch.apply(model, self_check=False)
    assert not (tmp_path / "found.json").exists()
    npu_patch.restore()
    assert self_check.NO_MODEL in npu_patch.apply().notes
    assert not (tmp_path / "found.json").exists()
    npu_patch.apply(model)
    assert (tmp_path / "found.json").exists()


@pytest.mark.parametrize(
    "mode",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.device("meta"),
        lambda: torch.autocast("npu", torch.bfloat16),
    ],
    ids=["inference", "no_grad", "meta", "autocast"],
)
def test_checks_run_apart_from_the_caller_and_leave_nothing(mode: Callable[[], Any], npu: torch.device) -> None:
    model = tiny("qwen3_moe").to(npu)
    with npu_patch.applied(model):  # what a process makes once
        pass
    gc.collect()
    state, own, held = torch.random.get_rng_state(), torch.npu.get_rng_state(), torch.npu.memory_allocated()
    with mode():
        report = npu_patch.apply(model)
    assert not report.warnings and not report.failed
    assert torch.equal(state, torch.random.get_rng_state()) and torch.equal(own, torch.npu.get_rng_state())
    gc.collect()
    assert torch.npu.memory_allocated() == held


def test_what_does_not_fit_into_the_time_is_left_to_the_next_apply(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny("qwen3").to(npu)
    monkeypatch.setattr(self_check, "BUDGET_S", 0.0)
    first = npu_patch.apply(model)
    (note,) = (line for line in first.notes if "did not fit" in line)
    assert not (tmp_path / "found.json").exists() and int(note.split()[0]) > 10
    monkeypatch.setattr(self_check, "BUDGET_S", 600.0)
    second = npu_patch.apply(model)
    assert not [line for line in second.notes if "did not fit" in line]
    assert (tmp_path / "found.json").exists()


@pytest.mark.parametrize(("after", "rank", "shown"), [(0.0, "0", True), (0.0, "1", False), (60.0, "0", False)])
def test_a_bar_is_shown_on_the_first_rank_once_it_takes_a_while(
    after: float,
    rank: str,
    shown: bool,
    npu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(self_check, "SHOWN_AFTER_S", after)
    monkeypatch.setenv("RANK", rank)
    npu_patch.apply(tiny("qwen3").to(npu))
    written = capsys.readouterr()
    assert ("operators on this device" in written.err) == shown and not written.out


# Optional kernels go through the same check. On the CPU, with kernels that are made up.

USUAL = choose(rms_norm.RMS_NORM.implementations, "cpu").chosen


def times(name: str, factor: float, optional: bool) -> Implementation:
    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        return USUAL.run(*args, **kwargs) * factor

    return Implementation(name, ("cpu",), run, USUAL.unsupported, optional=optional)


@pytest.mark.parametrize(
    ("fake", "usual", "triton", "ran"),
    [
        (1.0, 1.0, True, {"fake"}),
        (1.01, 1.0, True, {"usual"}),
        (1.01, 1.01, True, set()),
        (1.0, 1.01, "auto", {"fake"}),
        (1.01, 1.0, "auto", {"usual"}),
    ],
)
def test_an_asked_for_kernel_that_is_wrong_leaves_the_call_to_the_next(
    fake: float, usual: float, triton: bool | str, ran: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    implementations = times("fake", fake, True), times("usual", usual, False)
    patch = dataclasses.replace(
        rms_norm_patch.PATCH, op=dataclasses.replace(rms_norm.RMS_NORM, implementations=implementations)
    )
    monkeypatch.setattr(lifecycle, "CATALOGUE", (patch,))
    one_second = lambda forms: {name: Measured(seconds=1.0) for name in forms}  # noqa: E731
    monkeypatch.setattr(measurer, "clock", lambda device: one_second)
    monkeypatch.setattr(measure, "ELEMENTS", 256)
    model = tiny("qwen3")
    original = loss_and_gradients(model, tiny_batch())
    report = npu_patch.apply(model, device="cpu", triton=triton)
    found = loss_and_gradients(model, tiny_batch())
    assert apart(found, original) == {}
    (outcome,) = (each for each in report.patched if each.site.endswith("Qwen3RMSNorm.forward"))
    assert set(outcome.calls.ran_by) == ran


def test_an_operator_that_a_tuning_file_chooses_is_checked_too(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from npu_patch.measuring import tuning

    model, batch, seen = tiny("qwen3").to(npu), on_npu(), tuning.Forced(None)
    original = loss_and_gradients(model, batch)
    with npu_patch.applied(model, self_check=False, triton=True) as report:
        (held,) = (each for each in patched_sites(report) if each.outcome.site.endswith("Qwen3RMSNorm.forward"))
        held.replacement.dispatch.tuned = seen
        site, variant = held.outcome.site, held.outcome.variant
        loss_and_gradients(model, batch)
    file = tmp_path / "tuned.json"
    chosen = [tuning.Decision("rms_norm", site, variant, each, "torch_npu.npu_rms_norm") for each in seen]
    tuning.write(file, "npu", chosen)
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(file))
    with simulator.wrong_operator("npu_rms_norm", factor=1.01):
        report = npu_patch.apply(model, triton=True)
        assert_equals_unpatched(model, original)
    assert any("torch_npu.npu_rms_norm is wrong on this device" in line for line in report.warnings)


def test_only_simulated_operators_can_be_wrong() -> None:
    with (
        pytest.raises(ValueError, match=r"wrong_operator\('npu_rms'\): simulated are .*npu_rms_norm"),
        simulator.wrong_operator("npu_rms"),
    ):
        pass
