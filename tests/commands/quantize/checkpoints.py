"""Small checkpoints on disk, to quantise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npu_patch.checkpoints.folder import checkpoint_in
from npu_patch.commands import main

CONFIG = {"model_type": "made_up", "hidden_size": 12, "moe_intermediate_size": 20, "architectures": ["MadeUp"]}


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (30, 12),
        "model.layers.0.input_layernorm.weight": (12,),
        "model.layers.0.self_attn.q_proj.weight": (18, 12),
        "model.layers.0.self_attn.q_proj.bias": (18,),
        "model.layers.0.linear_attn.in_proj_ba.weight": (8, 12),
        "model.layers.0.linear_attn.in_proj_qkvz.weight": (40, 12),
        "model.layers.0.linear_attn.conv1d.weight": (40, 1, 4),
        "model.layers.1.mlp.gate.weight": (3, 12),
        "model.layers.1.mlp.shared_expert_gate.weight": (1, 12),
        "model.layers.1.mlp.experts.0.gate_proj.weight": (20, 12),
        "model.layers.1.mlp.experts.0.down_proj.weight": (12, 20),
        "model.visual.blocks.0.attn.qkv.weight": (9, 12),
        "lm_head.weight": (30, 12),
    }
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return made | {"model.positions": torch.arange(7), "logit_scale": torch.ones(1)}


INT8 = {
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.linear_attn.in_proj_qkvz.weight",
    "model.layers.1.mlp.experts.0.gate_proj.weight",
    "model.layers.1.mlp.experts.0.down_proj.weight",
}


def stored(
    folder: Path, tensors: Mapping[str, Tensor] | None = None, shards: int = 3, config: Mapping[str, Any] = CONFIG
) -> Path:
    """A checkpoint of that many shards, with a tokenizer's file and code beside."""
    tensors = weights() if tensors is None else tensors
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"made": "up"}')
    (folder / "modeling_made_up.py").write_text("pass\n")
    (folder / ".gitattributes").write_text("of the hub\n")
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def quantised(model: Path, output: Path, *options: str) -> int:
    return main(["quantize", str(model), str(output), *options])


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in checkpoint_in(folder).shards:
        found |= load_file(folder / name)
    return found


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def dequantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale")}
    return {
        name: (tensor.float() * tensors[name + "_scale"].float()).to(tensors[name + "_scale"].dtype)
        if tensor.dtype == torch.int8
        else tensor
        for name, tensor in plain.items()
    }
