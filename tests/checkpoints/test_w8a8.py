"""What a checkpoint says of its int8 weights is read from either description, and believed where it is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from npu_patch.checkpoints.folder import checkpoint_in
from npu_patch.checkpoints.safetensors_file import BadCheckpoint
from npu_patch.checkpoints.w8a8 import DESCRIPTION, config_of, description_of, w8a8_in

TENSORS = {
    "layer.weight": torch.ones(4, 6, dtype=torch.int8),
    "layer.weight_scale": torch.ones(4, 1, dtype=torch.bfloat16),
    "norm.weight": torch.ones(6, dtype=torch.bfloat16),
}
# As compressed-tensors 0.20 writes it.
OF_LLMCOMPRESSOR = {
    "config_groups": {
        "group_0": {
            "format": "int-quantized",
            "input_activations": {
                "actorder": None, "block_structure": None, "dynamic": True, "group_size": None, "num_bits": 8,
                "observer": None, "observer_kwargs": {}, "scale_dtype": None, "strategy": "token", "symmetric": True,
                "type": "int", "zp_dtype": None,
            },
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
                "observer": "minmax", "observer_kwargs": {}, "scale_dtype": None, "strategy": "channel",
                "symmetric": True, "type": "int", "zp_dtype": None,
            },
        }
    },
    "format": "int-quantized", "global_compression_ratio": None, "ignore": ["lm_head"], "kv_cache_scheme": None,
    "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
    "transform_config": {}, "version": "0.20.0",
}  # fmt: skip


def folder(
    path: Path, tensors: dict[str, Tensor] = TENSORS, config: Any = None, description: dict[str, Any] | None = None
) -> Path:
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({} if config is None else {"quantization_config": config}))
    if description is not None:
        (path / DESCRIPTION).write_text(json.dumps(description))
    return path


def described() -> dict[str, Any]:
    return description_of({name: name.startswith("layer") for name in TENSORS})


@pytest.mark.parametrize(
    ("config", "description", "ignored"),
    [
        (config_of(["lm_head"]), None, ("lm_head",)),
        (OF_LLMCOMPRESSOR, None, ("lm_head",)),
        (None, described(), ("norm.weight",)),
    ],
    ids=["ours", "of llmcompressor", "of msModelSlim"],
)
def test_either_description_is_read(config: Any, description: Any, ignored: tuple[str, ...], tmp_path: Path) -> None:
    found = w8a8_in(checkpoint_in(folder(tmp_path, config=config, description=description)))
    assert found is not None and list(found.weights) == ["layer.weight"] and found.ignored == ignored
    assert found.weights["layer.weight"].scale.shape == (4, 1)


@pytest.mark.parametrize("kind", ["config", "description"])
def test_a_scale_of_the_models_own_is_no_weights(kind: str, tmp_path: Path) -> None:
    tensors = TENSORS | {"logit_scale": torch.ones(1), "attn.k_scale": torch.ones(1)}
    description = description_of({name: name.startswith("layer") for name in tensors})
    described_by = {"config": config_of([])} if kind == "config" else {"description": description}
    found = w8a8_in(checkpoint_in(folder(tmp_path, tensors, **described_by)))
    assert found is not None and list(found.weights) == ["layer.weight"]


def test_shards_under_the_names_of_msmodelslim_are_read(tmp_path: Path) -> None:
    folder(tmp_path, description=described() | {"group_size": 0, "fa_quant_type": None})
    file = "quant_model_weight_w8a8_dynamic-00001-of-00001.safetensors"
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    index = {"metadata": {}, "weight_map": dict.fromkeys(TENSORS, file)}
    (tmp_path / "quant_model_weight_w8a8_dynamic.safetensors.index.json").write_text(json.dumps(index))
    found = w8a8_in(checkpoint_in(tmp_path))
    assert found is not None and list(found.weights) == ["layer.weight"]


def test_a_model_that_is_not_quantised_says_nothing(tmp_path: Path) -> None:
    assert w8a8_in(checkpoint_in(folder(tmp_path))) is None


def changed(path: str, value: Any) -> dict[str, Any]:
    config: Any = json.loads(json.dumps(config_of(["lm_head"])))
    *way, last = path.split(".")
    at = config
    for step in way:
        at = at[step]
    at[last] = value
    return config


@pytest.mark.parametrize(
    ("config", "description", "words"),
    [
        (changed("quant_method", "gptq"), None, "'gptq'"),
        (changed("format", "pack-quantized"), None, "'pack-quantized'"),
        (changed("config_groups.group_0.weights.num_bits", 4), None, "num_bits 4; known is num_bits 8"),
        (changed("config_groups.group_0.weights.strategy", "group"), None, "strategy 'group'"),
        (changed("config_groups.group_0.input_activations.dynamic", False), None, "input_activations of group_0"),
        (changed("config_groups.group_0.input_activations", None), None, "input_activations of group_0"),
        (None, {"model_quant_type": "W4A16"}, "the scheme W4A16 is unknown; known is W8A8_DYNAMIC"),
        (None, described() | {"layer.weight": "W8A8"}, "the scheme W8A8 is unknown"),
    ],
)
def test_another_scheme_is_refused_by_name(config: Any, description: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint) as refused:
        w8a8_in(checkpoint_in(folder(tmp_path, config=config, description=description)))
    assert words in str(refused.value)


@pytest.mark.parametrize("kind", ["config", "description"])
@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("layer.weight_scale", torch.ones(6, 1), "layer.weight_scale is [6, 1] beside a weight [4, 6]"),
        ("layer.weight_scale", torch.ones(1, 6), "known are [4, 1] and [4]"),
        ("layer.weight_scale", torch.ones(4, 1, dtype=torch.int32), "a scale I32"),
        ("layer.weight_scale", None, "layer.weight"),
        ("layer.weight", torch.ones(4, 6), "layer.weight is F32"),
        ("layer.weight", None, "has no layer.weight"),
    ],
)
def test_scales_that_do_not_fit_are_named(
    name: str, tensor: Tensor | None, words: str, kind: str, tmp_path: Path
) -> None:
    tensors = {key: value for key, value in {**TENSORS, name: tensor}.items() if value is not None}
    described_by = {"config": config_of([])} if kind == "config" else {"description": described()}
    with pytest.raises(BadCheckpoint) as refused:
        w8a8_in(checkpoint_in(folder(tmp_path, tensors, **described_by)))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"layer.weight": "model-2.safetensors"}, "lacks model-2.safetensors"),
        ({"layer.weight": "../model.safetensors"}, "not in the folder"),
        ({"lost.weight": "model-1.safetensors"}, "has no lost.weight"),
        ({}, "has no weight_map"),
    ],
)
def test_an_index_that_does_not_fit_is_named(index: dict[str, str], words: str, tmp_path: Path) -> None:
    folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(BadCheckpoint) as refused:
        checkpoint_in(tmp_path)
    assert words in str(refused.value)


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BadCheckpoint, match="no file in safetensors"):
        checkpoint_in(tmp_path)
