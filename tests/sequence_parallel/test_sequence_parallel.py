"""Two ranks that share each sequence compute what one device computes of whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from npu_patch import simulator
from tests.support.launched import run_ranks

CASES = (
    "causal", "experts", "sliding window", "windows and not", "sinks", "fewer key-value heads than ranks", "packed",
    "packed, flash attention", "padded", "checkpointed",
)  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    if not simulator.is_active():
        pytest.skip("what is counted is counted on the simulated NPU")
    found = run_ranks("sequence_parallel_ranks.py", directory=tmp_path_factory.mktemp("sequences"))
    assert [set(rank["cases"]) for rank in found] == [set(CASES)] * 2
    return found


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_whole_sequences(case: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "patched" in rank["cases"][case]
        for way, found in rank["cases"][case].items():
            assert found["error"] < 1e-6, way
            assert found["again"] < 1e-6, "whole sequences are attended to as before"
            assert "over_ranks" not in found["implementation"]
            assert way == "unpatched" or {"attention", "rms_norm", "rope"} <= set(found["ran"])


@pytest.mark.parametrize("case", CASES)
def test_four_exchanges_a_layer_and_as_many_back_and_no_wait_of_the_host_in_a_layer(
    case: str, ranks: list[dict[str, Any]]
) -> None:
    layers, again = 2, 2 if case == "checkpointed" else 1
    for found in (rank["cases"][case]["patched"] for rank in ranks):
        assert found["exchanges"] == layers * 4 * (1 + again)
        assert found["copies"] == []  # attention takes heads as they were exchanged
        assert found["waits"] <= 3  # a step: whether sequences are packed, and how; whether there is padding


def test_half_of_each_sequence_takes_half_of_the_memory(ranks: list[dict[str, Any]]) -> None:
    for peaks in (rank["peaks"] for rank in ranks):
        assert peaks["whole"] >= 1.8 * peaks["divided"]


SAID = {
    "heads": "5 attention heads over 2 ranks: accepted is a multiple of 2",
    "key heads": "3 key-value heads over 2 ranks: accepted is a multiple of 2",
    "tokens": "5 tokens of each sequence over 2 ranks: accepted is a multiple of 2",
    "eager": "attention 'eager' is a model's own: accepted is one that all have: ",
    "state": "layers of linear_attention: sequences are divided for full_attention and sliding_attention",
}


@pytest.mark.parametrize("what", SAID)
def test_what_cannot_be_divided_is_an_error_on_every_rank(
    what: str, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    for rank in ranks:
        assert rank["refused"][what].startswith(SAID[what])


def test_ranks_with_other_switches_are_named_on_each(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "rope: in place on rank 0, not in place on rank 1" in rank["unlike"]["switches"]
    assert ranks[0]["unlike"]["silent"].startswith("rank 1 did not ask whether all are patched alike within 1 s")
