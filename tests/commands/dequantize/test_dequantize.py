"""python -m npu_patch dequantize: a plain checkpoint of what the int8 weights are worth, as safely written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from npu_patch.checkpoints.folder import checkpoint_in
from npu_patch.checkpoints.w8a8 import w8a8_in
from npu_patch.commands import main
from npu_patch.commands.quantize import pieces
from npu_patch.commands.quantize import shard as shard_module
from npu_patch.commands.subject.tiny_model import tiny_model
from tests.commands.quantize.checkpoints import INT8, dequantised, files_in, quantised, stored, tensors_in, weights

FORMATS = ["compressed-tensors", "ascend"]


def plain(model: Path, output: Path) -> int:
    return main(["dequantize", str(model), str(output)])


def worth(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    made = dequantised(tensors) | {"logit_scale": tensors["logit_scale"]}  # which is no scale of a weight
    return {name: tensor for name, tensor in made.items() if not name.endswith("weight_offset")}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_int8_times_scale_and_all_else_is_as_it_was(
    dtype: torch.dtype, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 60)  # a weight is many pieces
    original = stored(tmp_path / "model", weights(dtype))
    assert quantised(original, tmp_path / "int8", "--format", kind) == 0
    before = files_in(tmp_path / "int8")
    assert plain(tmp_path / "int8", tmp_path / "out") == 0
    assert files_in(tmp_path / "int8") == before
    made, expected = tensors_in(tmp_path / "out"), worth(tensors_in(tmp_path / "int8"))
    assert made.keys() == expected.keys() == weights().keys()
    assert all(torch.equal(made[name], expected[name]) and made[name].dtype == expected[name].dtype for name in made)
    assert all(torch.equal(made[name], tensor) for name, tensor in weights(dtype).items() if name not in INT8)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (original / "config.json").read_text()
    )
    assert w8a8_in(checkpoint_in(tmp_path / "out")) is None
    assert (tmp_path / "out" / "modeling_made_up.py").read_bytes() == (original / "modeling_made_up.py").read_bytes()
    assert not list((tmp_path / "out").glob("quant*")) and not (tmp_path / "out" / ".quantize").exists()


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_next"])
def test_transformers_loads_it_and_it_computes_what_the_weights_are_worth(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, every_expert=True).bfloat16()
    model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
    assert quantised(tmp_path / "model", tmp_path / "int8") == 0
    assert plain(tmp_path / "int8", tmp_path / "out") == 0
    loaded, said = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(said.values()) and loaded.dtype == torch.bfloat16
    ids = torch.arange(2, 26)[None]
    with torch.no_grad():
        expected, found = (each.eval()(ids).logits.double() for each in (model, loaded))
    assert 0 < (found - expected).norm() / expected.norm() < 0.05
    named = dict(loaded.named_parameters())
    # int8 of what int8 is worth is the same int8, but for the rounding of the scale
    assert all((named[name] - p).abs().max() <= p.abs().max() / 120 for name, p in model.named_parameters())


def test_what_compressed_tensors_makes_of_it_is_the_same_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    tiny_model("qwen3").bfloat16().save_pretrained(tmp_path / "model")
    assert quantised(tmp_path / "model", tmp_path / "int8") == 0 and plain(tmp_path / "int8", tmp_path / "out") == 0
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "int8", dtype="auto", quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    made = tensors_in(tmp_path / "out")
    assert all(torch.equal(made[name], p) for name, p in theirs.named_parameters() if name in made)


def int8_model(folder: Path, tensors: dict[str, Tensor], dtype: str | None = None) -> Path:
    stored(folder, tensors, 1, config={"model_type": "made_up"} | ({"dtype": dtype} if dtype else {}))
    description = {"model_quant_type": "W8A8_DYNAMIC"} | dict.fromkeys(tensors, "W8A8_DYNAMIC")
    (folder / "quant_model_description.json").write_text(json.dumps(description))
    return folder


@pytest.mark.parametrize("shape", [(6,), (6, 1)], ids=str)
@pytest.mark.parametrize(
    ("named", "expected"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), (None, torch.float32)]
)
def test_scales_in_float32_give_the_dtype_of_the_model(
    named: str | None, expected: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    weight, scale = torch.randint(-127, 128, (6, 10), dtype=torch.int8), torch.rand(shape)
    model = int8_model(tmp_path / "model", {"a.weight": weight, "a.weight_scale": scale}, named)
    assert plain(model, tmp_path / "out") == 0
    (made,) = tensors_in(tmp_path / "out").values()
    assert made.dtype == expected and torch.equal(made, (weight.float() * scale.view(6, 1)).to(expected))


@pytest.mark.parametrize("scale", [(3, 8, 1), (3, 1, 12)], ids=["[E, out, in]", "[E, in, out]"])
def test_packed_experts_stay_packed(scale: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 100)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight, scales = torch.randint(-127, 128, (3, 8, 12), dtype=torch.int8), torch.rand(scale).bfloat16()
    model = int8_model(tmp_path / "model", {name: weight, f"{name}_scale": scales})
    assert plain(model, tmp_path / "out") == 0
    assert torch.equal(tensors_in(tmp_path / "out")[name], (weight.float() * scales.float()).bfloat16())


def test_a_scale_in_another_shard_is_found(tmp_path: Path) -> None:
    model = tmp_path / "int8"
    assert quantised(stored(tmp_path / "model", shards=1), model) == 0
    tensors = tensors_in(model)
    expected = worth(tensors)
    (model / "model.safetensors").unlink()
    scales = {name for name in tensors if name.endswith("weight_scale")}
    parts = {"a.safetensors": tensors.keys() - scales, "b.safetensors": scales}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, model / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert plain(model, tmp_path / "out") == 0
    made = tensors_in(tmp_path / "out")
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)


def test_interrupted_it_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantised(stored(tmp_path / "model"), tmp_path / "int8") == 0
    assert plain(tmp_path / "int8", tmp_path / "expected") == 0
    puts, calls, interruptions = shard_module._put, [0], 0

    def interrupted(*arguments: object) -> int:
        calls[0] += 1
        if calls[0] % 9 == 0:
            raise KeyboardInterrupt
        return puts(*arguments)

    monkeypatch.setattr(shard_module, "_put", interrupted)
    while (code := plain(tmp_path / "int8", tmp_path / "out")) == 130:
        interruptions += 1
        assert not (tmp_path / "out" / "config.json").exists() and interruptions < 20
    assert code == 0 and interruptions
    assert files_in(tmp_path / "out") == files_in(tmp_path / "expected")


def test_called_again_it_checks_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = tmp_path / "int8", tmp_path / "out"
    assert quantised(stored(tmp_path / "model"), model) == plain(model, out) == plain(model, out) == 0
    assert "3 were there already" in capsys.readouterr().out
    shard = next(out.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert plain(model, out) == 2
    assert f"{shard.name} is not what dequantize_manifest.json says" in capsys.readouterr().err


def half_quantised(folder: Path) -> None:
    (folder / "quantize_manifest.json").unlink()
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-3])


def unsymmetric(folder: Path) -> None:
    tensors = tensors_in(folder)
    tensors["model.layers.0.self_attn.q_proj.weight_offset"][3] = 2
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")


def unquantised(folder: Path) -> None:
    shutil.rmtree(folder)
    stored(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "there is no such folder"),
        (half_quantised, "is truncated"),
        (unsymmetric, "q_proj.weight_offset is not zero everywhere"),
        (unquantised, "none of its 15 tensors is a quantised weight"),
    ],
)
def test_what_cannot_be_dequantised_is_refused_in_one_line(
    damage: Callable[[Path], None], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantised(stored(tmp_path / "model"), tmp_path / "int8", "--format", "ascend") == 0
    damage(tmp_path / "int8")
    capsys.readouterr()
    assert plain(tmp_path / "int8", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and line.startswith("npu_patch dequantize: ")
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("where", ["int8", "int8/out"])
def test_the_model_itself_is_never_written_to(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantised(stored(tmp_path / "model"), tmp_path / "int8") == 0
    before = files_in(tmp_path / "int8")
    assert plain(tmp_path / "int8", tmp_path / where) == 2
    assert "within MODEL" in capsys.readouterr().err and files_in(tmp_path / "int8") == before
