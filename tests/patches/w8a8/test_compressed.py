"""Models that transformers loaded through compressed-tensors: they stay int8, compute in it, and are put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import npu_patch
from npu_patch import simulator
from npu_patch.commands import main
from npu_patch.commands.subject.tiny_model import tiny_model
from npu_patch.ops.w8a8.layer import W8A8Linear

pytest.importorskip("compressed_tensors")

IDS = torch.randint(2, 100, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("w8a8")
    tiny_model("qwen3").bfloat16().save_pretrained(path / "model")
    assert main(["quantize", str(path / "model"), str(path / "out")]) == 0
    return path / "out"


@pytest.fixture
def model(folder: Path, npu: torch.device) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(npu).eval()


def state(model: nn.Module) -> dict[str, Any]:
    """All that a preparation might touch."""
    found: dict[str, Any] = {}
    for name, layer in model.named_modules():
        own = {key: value for key, value in vars(layer).items() if key not in ("_parameters", "_forward_pre_hooks")}
        hooks, parameters = list(layer._forward_pre_hooks.items()), {k: id(v) for k, v in layer._parameters.items()}
        found[name] = type(layer), own, hooks, parameters
    return found


def test_such_a_model_stays_int8_computes_in_it_and_is_put_back(model: nn.Module, npu: torch.device) -> None:
    before = state(model)
    report = npu_patch.apply(model)
    layers = [layer for layer in model.modules() if isinstance(layer, W8A8Linear)]
    assert len(layers) == 14
    (prepared,) = report.prepared
    assert prepared.patch == "w8a8" and prepared.layers == 14
    with simulator.count() as counted, torch.no_grad():
        model(IDS.to(npu))
    assert counted.by_op["npu::npu_quant_matmul"][0] == 14
    assert all(layer.weight.dtype == torch.int8 for layer in layers)
    npu_patch.restore()
    assert state(model) == before
    with torch.no_grad():
        theirs = model(IDS.to(npu)).logits
    assert theirs.isfinite().all() and model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
