"""Models of transformers, quantised on disk: as near to the original as int8 is, and loaded with compressed-tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from npu_patch.checkpoints.folder import checkpoint_in
from npu_patch.checkpoints.w8a8 import config_of, w8a8_in
from npu_patch.commands.subject.tiny_model import tiny_model

from .checkpoints import dequantised, quantised, tensors_in

DENSE = ["qwen3", "qwen3_5_text"]
WITH_EXPERTS = ["qwen3_moe", "qwen3_next"]
IDS = torch.randint(2, 100, (2, 24), generator=torch.Generator().manual_seed(0))


def original(model_type: str, folder: Path) -> torch.nn.Module:
    model = tiny_model(model_type, every_expert=True).bfloat16()
    model.save_pretrained(folder, max_shard_size="100KB")
    return model


@torch.no_grad()
def distance(model: torch.nn.Module, other: torch.nn.Module) -> float:
    expected, found = (each(IDS).logits.double() for each in (model, other))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("model_type", DENSE + WITH_EXPERTS)
def test_logits_are_those_of_the_original_but_for_the_steps_of_int8(model_type: str, tmp_path: Path) -> None:
    model = original(model_type, tmp_path / "model")
    assert quantised(tmp_path / "model", tmp_path / "out") == 0
    tensors = tensors_in(tmp_path / "out")
    experts = {name for name in tensors if ".experts." in name and name.endswith("proj.weight")}
    assert bool(experts) == (model_type in WITH_EXPERTS)
    assert all(tensors[name].dtype == torch.int8 for name in experts)
    (tmp_path / "plain").mkdir()
    save_file(dequantised(tensors), tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16).eval()
    assert 0 < distance(model, plain) < 0.05


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("model_type", DENSE)
def test_transformers_loads_it_with_compressed_tensors(model_type: str, dequantize: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    model = original(model_type, tmp_path / "model")
    assert quantised(tmp_path / "model", tmp_path / "out") == 0
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    loaded, said = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True, **options
    )
    assert not any(said.values())
    names = dict(loaded.named_parameters())
    expected = tensors_in(tmp_path / "out")
    if dequantize:
        plain = dequantised(expected)
        assert all(torch.equal(names[name], plain[name]) for name in plain)
    else:
        assert names.keys() == expected.keys()
        assert all(torch.equal(names[name], expected[name]) for name in names)
    assert 0 < distance(model, loaded.eval()) < 0.05
    tokens = loaded.generate(IDS, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 28)


def written_by_compressed_tensors(model: torch.nn.Module, folder: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config

    config = {"config_groups": config_of([])["config_groups"], "ignore": ["lm_head"], "format": "int-quantized"}
    apply_quantization_config(model, QuantizationConfig(**config))
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.data.copy_(layer.weight.detach().float().abs().amax(-1, keepdim=True) / 127)
            layer.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


@pytest.mark.parametrize("model_type", DENSE)
def test_what_compressed_tensors_writes_is_read_and_is_what_is_written_here(model_type: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = original(model_type, tmp_path / "model")
    assert quantised(tmp_path / "model", tmp_path / "out", "--also", r".*in_proj_(a|b)$") == 0
    written_by_compressed_tensors(model, tmp_path / "theirs")
    ours, theirs = (w8a8_in(checkpoint_in(tmp_path / name)) for name in ("out", "theirs"))
    assert ours is not None and theirs is not None and ours.weights.keys() == theirs.weights.keys()
    made, expected = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "theirs")
    assert all(torch.equal(made[name + "_scale"], expected[name + "_scale"]) for name in ours.weights)
    # they divide and round in bfloat16
    assert all((made[name].int() - expected[name].int()).abs().max() <= 1 for name in ours.weights)
