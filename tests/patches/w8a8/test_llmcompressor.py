"""Models that llmcompressor itself wrote: loaded as int8, as near to the original as int8 is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import npu_patch
from npu_patch.commands.subject.tiny_model import tiny_model
from npu_patch.ops.w8a8.layer import W8A8Linear
from tests.support.w8a8_models import IDS, apart, loaded, logits, saved

llmcompressor = pytest.importorskip("llmcompressor")
LEFT = ["lm_head", "re:.*gate$", "re:.*in_proj_ba$", "re:.*in_proj_[ab]$"]


@pytest.fixture(autouse=True)
def nothing_applied() -> Iterator[None]:
    yield
    npu_patch.restore()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_next"])
def test_its_models_load_as_int8_and_generate(family: str, npu: torch.device, tmp_path: Path) -> None:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    saved(tiny_model(family, every_expert=True).bfloat16(), tmp_path / "original")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "original", dtype=torch.bfloat16)
    expected = logits(model)
    llmcompressor.oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="INT8", ignore=LEFT))
    model.save_pretrained(tmp_path / "int8", save_compressed=True)
    npu_patch.apply()
    int8 = loaded(tmp_path / "int8").to(npu)
    assert any(type(each) is W8A8Linear for each in int8.modules())
    held = {name for name, each in int8.named_parameters() if each.dtype is torch.int8}
    assert ("expert" in " ".join(held)) == (family != "qwen3")
    assert 0 < apart(logits(int8), expected) < 0.05
    assert int8.generate(IDS.to(npu), max_new_tokens=4, do_sample=False).shape == (2, 28)
