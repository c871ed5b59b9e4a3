"""W8A8 checkpoints as transformers loads them where npu_patch is applied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import npu_patch
from npu_patch.ops.w8a8.layer import W8A8Linear
from tests.support.w8a8_models import DENSE, IDS, WITH_EXPERTS, apart, loaded, logits, quantised

FORMATS = {"compressed-tensors": (), "ascend": ("--format", "ascend"), "packed": ("--keep-packed",)}


@pytest.mark.parametrize("written", FORMATS)
@pytest.mark.parametrize("model_type", DENSE + WITH_EXPERTS)
def test_what_is_int8_on_disk_is_int8_in_memory_and_computes(
    model_type: str, written: str, tmp_path: Path, npu: torch.device
) -> None:
    folder = quantised(model_type, tmp_path, *FORMATS[written])
    npu_patch.apply()
    model, said = loaded(folder, output_loading_info=True)
    assert not any(said.values())
    int8 = {name for name, each in model.named_parameters() if each.dtype == torch.int8}
    assert any(type(each) is W8A8Linear for each in model.modules())
    assert any(".experts." in name for name in int8) == (model_type in WITH_EXPERTS)
    assert not any(each.requires_grad for name, each in model.named_parameters() if name in int8 or "_scale" in name)
    assert 0 < apart(logits(model), logits(loaded(tmp_path / "original"))) < 0.05
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 27)


@pytest.mark.parametrize("written", FORMATS)
@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
def test_what_is_saved_again_is_the_same_to_the_bit(
    model_type: str, written: str, tmp_path: Path, npu: torch.device
) -> None:
    folder = quantised(model_type, tmp_path, *FORMATS[written])
    npu_patch.apply()
    model = loaded(folder)
    model.save_pretrained(tmp_path / "again")
    again, said = loaded(tmp_path / "again", output_loading_info=True)
    assert not any(said.values())
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], each) and found[name].dtype == each.dtype for name, each in expected.items())


def test_after_restore_loading_is_transformers_own_and_loaded_models_compute(tmp_path: Path, npu: torch.device) -> None:
    from transformers import modeling_utils

    original = modeling_utils.get_hf_quantizer
    folder = quantised("qwen3_moe", tmp_path)
    npu_patch.apply()
    assert modeling_utils.get_hf_quantizer is not original
    model = loaded(folder)
    expected = logits(model)
    npu_patch.restore()
    assert modeling_utils.get_hf_quantizer is original
    assert torch.equal(logits(model), expected)
