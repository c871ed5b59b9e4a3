"""Two ranks that share each sequence compute what one device computes of whole ones."""

from __future__ import annotations

from typing import Any

import pytest

from npu_patch import simulator
from tests.support.launched import run_ranks

CASES = (
    "causal", "experts", "sliding window", "windows and not", "sinks", "fewer key-value heads than ranks", "packed",
    "packed, flash attention", "padded", "checkpointed", "key-value heads that the ranks do not divide",
    "gated delta nets", "gated delta nets, experts", "gated delta nets, fewer key heads than ranks",
    "gated delta nets, checkpointed", "gated delta nets, padded", "gated delta nets, packed",
    "gated delta nets, packed by lengths",
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
        assert {"before", "after", "off"} <= set(rank["cases"][case])
        for way, found in rank["cases"][case].items():
            assert found["unequal"] == [], way
            assert found["again"] < 1e-6, "whole sequences are attended to as before"
            assert "over_ranks" not in found["implementation"]
            served = {"attention", "rms_norm", "rope", *(["gated_delta_net"] if "gated" in case else [])}
            assert way == "unpatched" or served <= set(found["ran"])


@pytest.mark.parametrize("case", CASES)
def test_few_exchanges_a_layer_and_as_many_back_and_no_wait_of_the_host_in_a_layer(
    case: str, ranks: list[dict[str, Any]]
) -> None:
    """Attention: q, k, v and back. A gated delta net: the convolution's first tokens, all that the rule takes, back."""
    of_layers, again = 4 + 3 if "gated" in case else 4 + 4, 2 if "checkpointed" in case else 1
    for found in (rank["cases"][case]["before"] for rank in ranks):
        assert found["exchanges"] == of_layers * (1 + again)
        # Attention takes heads as they were exchanged. Gradients of heads that were repeated are summed up elsewhere.
        beyond_those_of_whole = [each for each in found["copies"] if "attention" in each or "ranks" not in case]
        assert beyond_those_of_whole == []
        assert found["waits"] <= 3  # a step: whether sequences are packed, and how; whether there is padding


@pytest.mark.parametrize("case", CASES)
def test_the_switch_leaves_whole_sequences_to_each_rank(case: str, ranks: list[dict[str, Any]]) -> None:
    for found in (rank["cases"][case]["off"] for rank in ranks):
        assert found["exchanges"] == 0 and found["unequal"] == []


def test_half_of_each_sequence_takes_half_of_the_memory(ranks: list[dict[str, Any]]) -> None:
    for peaks in (rank["peaks"] for rank in ranks):
        assert peaks["whole"] >= 1.8 * peaks["divided"]


SAID = {
    "heads": "5 attention heads over 2 ranks: accepted is a multiple of 2",
    "value heads": "9 value heads of gated delta nets over 2 ranks: accepted is a multiple of 2",
    "tokens": "5 tokens of each sequence over 2 ranks: accepted is a multiple of 2",
    "few tokens": "2 tokens of each sequence on a rank: a convolution needs the 3 before its own",
    "packed untold": "packed sequences would leak into each other: position_ids start anew",
    "eager": "attention 'eager' is a model's own: accepted is one that all have: ",
    "state": "layers of conv: sequences are divided for full_attention, sliding_attention and gated delta nets",
    "other nets": "layers of linear_attention: sequences are divided for ",
}


@pytest.mark.parametrize("what", SAID)
def test_what_cannot_be_divided_is_an_error_on_every_rank(what: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["refused"][what].startswith(SAID[what])


UNLIKE = {
    "asked": "rope: in place on rank 0, not in place on rank 1",
    "switches": "rope: in place on rank 0, not in place on rank 1",
    "patched beside unpatched": "rms_norm: in place on rank 0, not in place on rank 1",
    "divided beside whole": "sequence_parallel, divides: on on rank 0, off on rank 1",
}


@pytest.mark.parametrize("what", UNLIKE)
def test_ranks_that_are_not_alike_are_named_on_each(what: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert UNLIKE[what] in rank["unlike"][what]


def test_a_rank_that_does_not_ask_is_named_and_those_that_are_alike_go_on(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["unlike"]["silent"].startswith("rank 1 did not ask whether all are patched alike within 1 s")
    assert [rank["unlike"]["alike"] for rank in ranks] == ["nothing"] * 2
