"""Ranks that are not patched alike are told so, each of them, and no rank waits for another for ever."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import npu_patch
from npu_patch.applying import ranks
from npu_patch.applying.ranks import State, in_place, why_not_same
from npu_patch.measuring import tuning
from tests.support.tiny_models import tiny


def asked(states: list[State], world: int | None = None, timeout: float = 20.0) -> list[str | None]:
    """What each of the ranks is told that ask."""
    store, world = dist.HashStore(), world or len(states)
    with ThreadPoolExecutor() as pool:
        each = [pool.submit(why_not_same, store, i, range(world), s, timeout, "0") for i, s in enumerate(states)]
        return [future.result() for future in each]


@pytest.fixture
def state(npu: Any) -> State:
    npu_patch.apply(tiny("qwen3").to(npu))
    return in_place()


def test_ranks_that_are_patched_alike_are_told_nothing(state: State) -> None:
    assert {"rms_norm", "rope", "swiglu", "attention"} <= set(state)
    assert asked([state, state, state]) == [None] * 3


def test_sites_that_only_one_rank_has_are_those_of_its_part_of_the_model(state: State) -> None:
    part = {**state, "rms_norm": {**state["rms_norm"], "another.Norm": "weight by torch_npu.npu_rms_norm"}}
    assert asked([state, part]) == [None, None]


DIFFERENT = {
    "a switch": (
        lambda s: {k: v for k, v in s.items() if k != "rope"},
        "rope: in place on ranks 0, 2, not in place on rank 1",
    ),
    "an implementation": (
        lambda s: {**s, "swiglu": {site: "gate and up by Triton" for site in s["swiglu"]}},
        "Triton on rank 1",
    ),
    "a tuning file": (lambda s: {**s, "tuning": {"file": "0123"}}, "tuning, file: none on ranks 0, 2, 0123 on rank 1"),
    "a version": (lambda s: {**s, "version": {"npu_patch": "0.0"}}, "version, npu_patch: "),
}  # fmt: skip


@pytest.mark.parametrize("what", DIFFERENT)
def test_every_rank_is_told_who_differs(what: str, state: State) -> None:
    change, words = DIFFERENT[what]
    for told in asked([state, change(state), state]):
        assert told is not None and told.startswith("the ranks are not patched alike: ") and words in told


def test_a_rank_that_does_not_ask_is_named(state: State) -> None:
    begun = time.monotonic()
    told = asked([state, state], world=4, timeout=1.0)
    assert told == ["ranks 2, 3 did not ask whether all are patched alike within 1 s: is it patched?"] * 2
    assert time.monotonic() - begun < 5


def test_a_process_of_its_own_is_asked_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for: list[Any] = []
    monkeypatch.setattr(ranks, "why_not_same", lambda *arguments: asked_for.append(arguments))
    npu_patch.require_same_on_all_ranks()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    try:
        npu_patch.require_same_on_all_ranks()
    finally:
        dist.destroy_process_group()
    assert not asked_for


def test_a_tuning_file_is_known_by_what_it_says(npu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name, site in (("one", "a.Norm"), ("another", "a.Norm"), ("third", "b.Norm")):
        file = tmp_path / f"{name}.json"
        tuning.write(file, "npu", [tuning.Decision("rms_norm", site, "weight", (), "original")])
        monkeypatch.setenv("TWINKLE_NPU_TUNE", str(file))
        with npu_patch.applied(tiny("qwen3")):
            found.append(in_place()["tuning"]["file"])
    assert found[0] == found[1] != found[2]
    file.write_text(file.read_text().replace('"format": 6', '"format": 5'))  # which nobody follows
    with npu_patch.applied(tiny("qwen3")):
        assert in_place()["tuning"]["file"] == "none"
