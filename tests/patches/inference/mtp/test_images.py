"""Models with images: drafts after a prompt with pictures, whose positions have several axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from npu_patch import applied
from npu_patch.checkpoints.beside import write_beside
from npu_patch.commands.subject.vision.batches import padded
from npu_patch.commands.subject.vision.drawing import several
from npu_patch.commands.subject.vision.families import FAMILIES
from npu_patch.patches.inference.mtp import head as heads
from tests.support.heads import GREEDY, prompt
from tests.support.vision_cases import FULL, made


@pytest.mark.parametrize("how", [{"use_mtp": True, "num_assistant_tokens": 2}, {"prompt_lookup_num_tokens": 3}])
@pytest.mark.parametrize("pictures", [True, False])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_tokens_after_a_prompt_with_pictures_are_those_of_plain_decoding(
    family: str, pictures: bool, how: dict[str, Any], tmp_path: Path
) -> None:
    model = made(family, FULL)
    model.save_pretrained(tmp_path)
    torch.manual_seed(5)
    write_beside(tmp_path, heads.published_names(heads.new_head(model)), "mtp.safetensors")
    model = type(model).from_pretrained(tmp_path).eval()
    given = {"input_ids": prompt()}
    if pictures:
        given = padded(model, FAMILIES[family], [several((24, 40), (33, 17))])
        given.pop("labels", None)
    plain = model.generate(**given, max_new_tokens=48, use_cache=True, **GREEDY)
    with applied(model, device="cpu", mtp=True):
        found = model.generate(**given, max_new_tokens=48, use_cache=True, **how, **GREEDY)
    assert torch.equal(found, plain)
