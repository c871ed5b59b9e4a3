"""Two CPU ranks over gloo: a patched model is wrapped, sharded, trained, saved and loaded exactly as an unpatched one.

The ranks run the patches on the CPU (`device="cpu"`), as the simulated NPU has no HCCL.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SAME = ("classes", "names", "placements", "keys")


def run_ranks(script: str, *arguments: str, directory: Path) -> list[dict[str, Any]]:
    """What each of two ranks wrote down."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / script), *arguments, str(directory)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=180)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors[0][-3000:]
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp", "accelerate"])
def test_wrapped_sharded_trained_saved_and_loaded_as_unpatched(wrapper: str, tmp_path: Path) -> None:
    for rank in run_ranks("ranks.py", wrapper, directory=tmp_path):
        original = rank["never"]
        assert original["loss after loading"] == original["loss before saving"]
        assert (wrapper == "ddp") == (set(original["placements"]) == {"whole"})
        for when in ("before", "after"):
            patched = rank[when]
            assert {name: patched[name] for name in SAME} == {name: original[name] for name in SAME}
            assert patched["loss after loading"] == patched["loss before saving"]
            losses = [
                (float.fromhex(a), float.fromhex(b)) for a, b in zip(patched["losses"], original["losses"], strict=True)
            ]
            assert all(abs(a - b) < 1e-5 * b for a, b in losses)
            assert {"rms_norm", "rope", "swiglu"} <= set(patched["ran"])
            assert patched["fell through"] == []
            assert patched["checkpoint"].keys() == original["checkpoint"].keys()
            norms = [(patched["checkpoint"][name], norm) for name, norm in original["checkpoint"].items()]
            assert all(abs(a - b) < 1e-5 * b for a, b in norms)


def test_an_attention_over_both_ranks_in_the_place_of_torchs_is_called(tmp_path: Path) -> None:
    """Context parallelism: a local attention would be right about half of the keys."""
    for rank in run_ranks("context_parallel_ranks.py", directory=tmp_path):
        assert rank["unpatched"] < 1e-5 and rank["patched"] < 1e-5
        named = "torch.nn.functional.scaled_dot_product_attention was bound anew by __main__.over_both_ranks"
        assert rank["ran"] == 0 and rank["reasons"] == [named]
