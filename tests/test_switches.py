"""The switches: defaults, groups, aliases, precedence, and what a wrong value says."""

from __future__ import annotations

import pytest

import npu_patch
from npu_patch import log
from npu_patch.switches import BY_NAME, SWITCHES, resolve


def test_defaults() -> None:
    switches = resolve({}, {})
    assert {name for name in BY_NAME if not switches[name]} == {
        "gated_rmsnorm_fp32",
        "triton_cache",
        "recurrent_bf16",
        "weight_nz",
        "prefetch",
        "mtp",
    }
    measured = ("triton", "swiglu_recompute", "patch_embedding", "head_padding")
    assert [switches[name] for name in measured] == ["auto"] * 4
    assert switches.sources["rope"] == "default"


@pytest.mark.parametrize("word", ["0", "false", "OFF", "no", " No "])
def test_every_word_for_off(word: str) -> None:
    switches = resolve({}, {"TWINKLE_NPU_FLA": word})
    assert not switches["fla"]
    assert switches.sources["fla"] == "TWINKLE_NPU_FLA"


@pytest.mark.parametrize("word", ["1", "true", "On", "yes"])
def test_every_word_for_on(word: str) -> None:
    assert resolve({}, {"TWINKLE_NPU_GATED_RMSNorm_FP32": word})["gated_rmsnorm_fp32"]


@pytest.mark.parametrize("word", ["", "2", "yep", "None"])
def test_another_word_is_an_error_that_names_variable_value_and_accepted(word: str) -> None:
    with pytest.raises(ValueError, match=rf"TWINKLE_NPU_ROPE='{word}': accepted are 1/true/on/yes and 0/false/off/no"):
        resolve({}, {"TWINKLE_NPU_ROPE": word})


def test_a_group_is_the_default_of_its_members_and_a_member_wins() -> None:
    switches = resolve({}, {"TWINKLE_NPU_FUSED_OPS": "0", "TWINKLE_NPU_ROPE": "1"})
    assert switches["rope"]
    assert not any(switches[name] for name in ("rms_norm", "swiglu", "sdpa"))
    assert switches["fla"] and switches["moe_patch"]
    assert switches.sources["rms_norm"] == "TWINKLE_NPU_FUSED_OPS"


@pytest.mark.parametrize(
    ("environ", "padding", "source"),
    [
        ({}, "auto", "default"),
        ({"TWINKLE_NPU_VISION": "1"}, "auto", "TWINKLE_NPU_VISION"),
        ({"TWINKLE_NPU_VISION": "0"}, False, "TWINKLE_NPU_VISION"),
        ({"TWINKLE_NPU_VISION": "0", "TWINKLE_NPU_HEAD_PADDING": "auto"}, "auto", "TWINKLE_NPU_HEAD_PADDING"),
        ({"TWINKLE_NPU_VISION": "1", "TWINKLE_NPU_HEAD_PADDING": "1"}, True, "TWINKLE_NPU_HEAD_PADDING"),
    ],
)
def test_a_group_that_is_on_leaves_its_members_their_own_defaults(
    environ: dict[str, str], padding: bool | str, source: str
) -> None:
    switches = resolve({}, environ)
    assert (switches["head_padding"], switches.sources["head_padding"]) == (padding, source)


def test_keywords_win_over_the_environment() -> None:
    switches = resolve({"rope": True}, {"TWINKLE_NPU_ROPE": "0"})
    assert switches["rope"]
    assert switches.sources["rope"].startswith("apply(rope=")


def test_the_older_name_is_an_alias_and_must_not_contradict() -> None:
    assert not resolve({}, {"TWINKLE_NPU_GMM_PATCH": "0"})["moe_patch"]
    with pytest.raises(ValueError, match="TWINKLE_NPU_MOE_PATCH='1' and TWINKLE_NPU_GMM_PATCH='0' contradict"):
        resolve({}, {"TWINKLE_NPU_MOE_PATCH": "1", "TWINKLE_NPU_GMM_PATCH": "0"})


def test_an_unknown_variable_is_logged_with_the_closest_name(caplog: pytest.LogCaptureFixture) -> None:
    log.forget()
    resolve({}, {"TWINKLE_NPU_ROPES": "1"})
    assert "TWINKLE_NPU_ROPES (did you mean TWINKLE_NPU_ROPE?)" in caplog.text


@pytest.mark.parametrize(
    ("word", "value"), [("auto", "auto"), (" AUTO", "auto"), ("1", True), ("on", True), ("0", False), ("No", False)]
)
def test_a_three_valued_variable(word: str, value: bool | str) -> None:
    assert resolve({}, {"TWINKLE_NPU_TRITON": word})["triton"] == value


@pytest.mark.parametrize("value", ["auto", True, False, 1, 0])
def test_a_three_valued_keyword(value: bool | int | str) -> None:
    assert resolve({"triton": value}, {"TWINKLE_NPU_TRITON": "0"})["triton"] == value


@pytest.mark.parametrize("word", ["", "2", "automatic"])
def test_another_word_for_a_three_valued_variable_is_an_error(word: str) -> None:
    accepted = "accepted are auto, 1/true/on/yes and 0/false/off/no"
    with pytest.raises(ValueError, match=f"TWINKLE_NPU_TRITON='{word}': {accepted}"):
        resolve({}, {"TWINKLE_NPU_TRITON": word})


def test_a_path_is_taken_as_it_is() -> None:
    assert resolve({}, {"TWINKLE_NPU_TRITON_CACHE": "/some/File.json"})["triton_cache"] == "/some/File.json"
    assert resolve({}, {"TWINKLE_NPU_TRITON_CACHE": ""})["triton_cache"] is None


def test_foreign_variables_are_not_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    log.forget()
    resolve({}, {"ASCEND_LAUNCH_BLOCKING": "1", "TWINKLE_MODE": "x"})
    assert not caplog.records


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"ropes": True}, TypeError, "'ropes'.*did you mean rope"),
        ({"rope": "yes"}, ValueError, r"apply\(rope='yes'\): accepted are True \(or 1\) and False \(or 0\)"),
        ({"rope": 2}, ValueError, r"apply\(rope=2\): accepted are True \(or 1\) and False \(or 0\)"),
        ({"triton": "yes"}, ValueError, r"apply\(triton='yes'\): accepted are 'auto', True .or 1. and False .or 0."),
        ({"triton": 2}, ValueError, r"apply\(triton=2\): accepted are 'auto'"),
        ({"triton_cache": 3}, ValueError, r"apply\(triton_cache=3\): accepted are a path and None"),
    ],
)
def test_a_wrong_keyword_names_itself_and_applies_nothing(
    arguments: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        npu_patch.apply(**arguments)
    assert not npu_patch.report().outcomes


def test_a_group_stands_before_its_members() -> None:
    order = [switch.name for switch in SWITCHES]
    assert all(order.index(switch.group) < order.index(switch.name) for switch in SWITCHES if switch.group)


@pytest.mark.parametrize("name", ["rope", "triton"])
def test_numbers_stand_for_on_and_off_in_every_keyword(name: str) -> None:
    assert [resolve({name: value}, {})[name] for value in (1, 0)] == [True, False]
    assert resolve({name: 0}, {}).sources[name] == f"apply({name}=False)"


def test_a_switch_of_another_door_is_a_keyword_there_and_not_of_apply() -> None:
    door, variable = "SequenceParallel()", "TWINKLE_NPU_SEQUENCE_PARALLEL"
    assert resolve({}, {}, of=door)["sequence_parallel"]
    assert not resolve({}, {variable: "off"}, of=door)["sequence_parallel"]
    switches = resolve({"sequence_parallel": True}, {variable: "0"}, of=door)
    assert switches["sequence_parallel"]
    assert switches.sources["sequence_parallel"] == "SequenceParallel(sequence_parallel=True)"
    with pytest.raises(ValueError, match=r"SequenceParallel\(sequence_parallel='no'\): accepted are True"):
        resolve({"sequence_parallel": "no"}, {}, of=door)
    with pytest.raises(TypeError, match=r"apply\(\) got the unknown switch 'sequence_parallel'"):
        npu_patch.apply(sequence_parallel=False)
    with pytest.raises(TypeError, match=r"SequenceParallel\(\) got the unknown switch 'rope'.*sequence_parallel"):
        resolve({"rope": False}, {}, of=door)
