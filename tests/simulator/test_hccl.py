"""torch_npu's own ProcessGroupHCCL between two processes, each with a simulated NPU of its own."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.hccl_ranks import CASES, FAULTS
from tests.support.launched import run_ranks

pytestmark = pytest.mark.usefixtures("simulated")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks("hccl_ranks.py", directory=tmp_path_factory.mktemp("hccl"))


@pytest.mark.parametrize("case", CASES)
def test_collective(case: str, ranks: list[dict[str, Any]]) -> None:
    assert [rank["cases"][case] for rank in ranks] == [None, None]


SUM = "HcclAllReduce of 4 float32, sum"
DISAGREED = {  # what rank 0 called, and rank 1
    "another count": (SUM, "HcclAllReduce of 5 float32, sum"),
    "another dtype": ("HcclAllReduce of 4 bfloat16, sum", SUM),
    "another op": (SUM, "HcclAllReduce of 4 float32, max"),
}
# What each rank says; None: it has no part in it. Each names both sides.
SAID: dict[str, tuple[str | None, str | None]] = {
    **{
        fault: (
            f"disagree: rank 0 called {zero} .*, rank 1 called {one}",
            f"rank 1 called {one} .*, rank 0 called {zero}",
        )
        for fault, (zero, one) in DISAGREED.items()
    },
    "another call": (
        rf"rank 0 called {SUM} \(collective 2\), rank 1 called {SUM} \(collective 1\)",
        f"rank 1 called {SUM} .*, rank 0 called HcclBroadcast of 4 float32, root 0",
    ),
    "another root": (
        "rank 0 called .*, root 1 .*, rank 1 called .*, root 1",
        "rank 1 called .*, root 0 .*, rank 0 called .*, root 0",
    ),
    "other rows": (
        "rank 0 called HcclAlltoAll of 3 .*, rank 1 called .* of 2 ",
        "rank 1 called HcclAlltoAll of 1 .*, rank 0 called .* of 3 ",
    ),
    "a second call after a failure": ("an earlier call of communicator .* failed",) * 2,
    "a product of bfloat16": ("HcclAllReduce: prod does not take bfloat16",) * 2,
    "a sum of float64": ("Unsupported data type at::kDouble",) * 2,
    "one device for both": ("ranks 0 and 1 of communicator .* both use device 0", "ranks 1 and 0 .* both use device 0"),
    "late": (r"rank 0 waited for rank 1 of communicator .* HCCL_EXEC_TIMEOUT \(1 s\)", None),
    "late at the first call": ("rank 0 waited 1 s for 1 of 2 ranks to create communicator", None),
    "dead": ("HcclAllReduce: rank 1 of communicator .* is gone", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_an_error_that_says_what_each_side_did(fault: str, ranks: list[dict[str, Any]]) -> None:
    for rank, said in zip(ranks, SAID[fault], strict=True):
        if said is not None:
            assert re.search(said, rank["faults"][fault] or ""), rank["faults"][fault]
            assert rank["seconds"][fault] < 6


def test_what_is_sent_is_counted(ranks: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(ranks):
        counts = rank["counts"]
        assert counts["collectives_by_call"] == {
            "HcclAllReduce": [2, 2 * 24],
            "HcclBroadcast": [1, 0 if number else 24],
            "HcclAllGather": [1, 24],
        }
        assert (counts["collectives"], counts["collective_bytes"]) == (4, 72 if number else 96)
        assert f"4 collectives, {counts['collective_bytes']} bytes" in counts["text"]


def test_a_megabyte_costs_little_processor_time(ranks: list[dict[str, Any]]) -> None:
    assert sum(rank["milliseconds"] for rank in ranks) < 5
