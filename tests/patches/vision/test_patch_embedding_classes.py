"""Classes of the installed transformers that embed patches are served by what their layers compute. All of them, which
takes half a minute: `scripts/count_vision_parts.py --classes`."""

from __future__ import annotations

import pytest

from scripts.count_vision_parts import classes

VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v", "internvl", "smolvlm", "siglip")


@pytest.mark.parametrize("family", VL)
def test_towers_of_vision_language_models_are_served(family: str) -> None:
    found = classes(family)
    assert found.served and not found.by_source and not found.others


def test_a_padded_one_is_told_from_them() -> None:
    found = classes("vitpose_backbone")
    assert not found.served and list(found.others) == ["VitPoseBackbonePatchEmbeddings"]
