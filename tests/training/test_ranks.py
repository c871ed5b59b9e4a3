"""Two CPU ranks over gloo: a patched model is wrapped, sharded, trained, saved and loaded exactly as an unpatched one.

The ranks run the patches on the CPU (`device="cpu"`); on NPUs: test_engines.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.launched import run_ranks

SAME = ("classes", "names", "placements", "keys")


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
