"""What is quantised, how near it is, what is written beside it, and which input is refused without a loss."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_patch.checkpoints.folder import checkpoint_in
from npu_patch.checkpoints.w8a8 import w8a8_in
from npu_patch.commands.quantize import shard as shard_module

from .checkpoints import CONFIG, INT8, files_in, quantised, stored, tensors_in, weights

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
def test_matrices_of_layers_and_experts_are_as_near_as_int8_can_be(
    shards: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = weights(dtype)
    tensors["model.layers.0.self_attn.q_proj.weight"][0] = 0
    assert quantised(stored(tmp_path / "model", tensors, shards), tmp_path / "out") == 0
    made = tensors_in(tmp_path / "out")
    assert {name for name, tensor in made.items() if tensor.dtype == torch.int8} == INT8
    for name, tensor in tensors.items():
        if name not in INT8:
            assert torch.equal(made[name], tensor) and name + "_scale" not in made
            continue
        scale = made[name + "_scale"]
        assert scale.shape == (len(tensor), 1)
        assert scale.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        wide, error = tensor.double(), (made[name].double() * scale.double() - tensor.double()).abs()
        # half a step; and where the scale was rounded down, what the largest value is cut off by
        assert (error <= scale.double() / 2 + wide.abs() * torch.finfo(dtype).eps).all()
        assert made[name].abs().amax(-1).eq(127).logical_or(wide.abs().amax(-1) == 0).all()


def test_tiny_half_weights_are_as_near_as_int8_can_be(tmp_path: Path) -> None:
    """Their scales would be subnormal in float16."""
    tensors = {"a.weight": torch.tensor([[1e-4, -2e-5], [1.0, 0.0]], dtype=torch.float16)}
    assert quantised(stored(tmp_path / "model", tensors, 1), tmp_path / "out") == 0
    made = tensors_in(tmp_path / "out")
    assert made["a.weight_scale"].dtype == torch.float32
    assert made["a.weight"].tolist() == [[127, -25], [127, 0]]


def packed_experts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(3, 40, 12, generator=generator).bfloat16(),
        "model.layers.0.mlp.experts.down_proj": torch.randn(3, 12, 20, generator=generator).bfloat16(),
    }


@pytest.mark.parametrize("turned", [False, True], ids=["[E, out, in]", "[E, in, out]"])
@pytest.mark.parametrize("kind", ["compressed-tensors", "ascend"])
def test_packed_experts_become_those_that_were_never_packed(kind: str, turned: bool, tmp_path: Path) -> None:
    gate_up, down = packed_experts().values()
    apart = {}
    for expert in range(3):
        for name, tensor in zip(("gate", "up", "down"), (*gate_up[expert].chunk(2), down[expert]), strict=True):
            apart[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"] = tensor.clone()
    tensors = {name: tensor.mT.contiguous() if turned else tensor for name, tensor in packed_experts().items()}
    assert quantised(stored(tmp_path / "packed", tensors, 2), tmp_path / "out", "--format", kind) == 0
    assert quantised(stored(tmp_path / "apart", apart, 2), tmp_path / "expected", "--format", kind) == 0
    made, expected = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "expected")
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)
    file = "config.json" if kind != "ascend" else "quant_model_description.json"
    assert json.loads((tmp_path / "out" / file).read_text()) == json.loads((tmp_path / "expected" / file).read_text())


@pytest.mark.parametrize("turned", [False, True], ids=["[E, out, in]", "[E, in, out]"])
def test_packed_experts_that_stay_so_have_a_scale_for_each_output(turned: bool, tmp_path: Path) -> None:
    packed = packed_experts()
    tensors = {name: tensor.mT.contiguous() if turned else tensor for name, tensor in packed.items()}
    assert quantised(stored(tmp_path / "model", tensors), tmp_path / "out", "--keep-packed") == 0
    made = tensors_in(tmp_path / "out")
    for name, tensor in packed.items():
        values, scale = made[name], made[name + "_scale"]
        values, scale = (values.mT, scale.mT) if turned else (values, scale)
        assert scale.shape == (*tensor.shape[:2], 1)
        assert ((values.float() * scale.float() - tensor.float()).abs() <= scale.float() * 0.75).all()
    found = w8a8_in(checkpoint_in(tmp_path / "out"))
    assert found is not None and set(found.weights) == set(packed)


@pytest.mark.parametrize("beside", ["gate_up_proj_bias", None], ids=["biases", "another name"])
def test_experts_that_may_be_packed_in_another_way_are_left_alone(
    beside: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.0.mlp.experts." + ("gate_up_proj" if beside else "w13")
    tensors = weights() | {name: torch.ones(3, 40, 12)}
    if beside:
        tensors[f"model.layers.0.mlp.experts.{beside}"] = torch.ones(3, 40)
    assert quantised(stored(tmp_path / "model", tensors), tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["left"]["packed experts of an unknown kind"] == 1
    assert torch.equal(tensors_in(tmp_path / "out")[name], tensors[name])


def test_packed_experts_whose_inputs_are_unclear_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = weights() | {"model.layers.0.mlp.experts.down_proj": torch.ones(2, 20, 20)}
    assert quantised(stored(tmp_path / "model", tensors), tmp_path / "out", "--json") == 0
    left = json.loads(capsys.readouterr().out)["left"]
    assert any("is unclear" in why for why in left)


def test_configuration_names_what_is_no_int8(tmp_path: Path) -> None:
    quantised(stored(tmp_path / "model"), tmp_path / "out", "--ignore", r".*q_proj$")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ignored = config.pop("quantization_config")["ignore"]
    assert config == CONFIG
    linear = {name.removesuffix(".weight") for name, t in weights().items() if t.dim() == 2 and name.endswith("weight")}
    import re

    told = {m for m in linear if any(m == i or (i[:3] == "re:" and re.match(i[3:], m)) for i in ignored)}
    int8 = {name.removesuffix(".weight") for name, t in tensors_in(tmp_path / "out").items() if t.dtype == torch.int8}
    assert linear - told == int8 and not any("q_proj" in name for name in int8)


def test_routers_of_any_depth_and_layers_that_lie_the_other_way_are_left_alone(tmp_path: Path) -> None:
    tensors = {f"layers.0.{name}.weight": torch.randn(8, 8) for name in ("mlp.router.layer", "attn.c_attn", "up_proj")}
    checkpoint = stored(tmp_path / "model", tensors, 1)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    assert quantised(checkpoint, tmp_path / "out") == 0
    made = tensors_in(tmp_path / "out")
    assert [name for name, each in made.items() if each.dtype == torch.int8] == ["layers.0.up_proj.weight"]


@pytest.mark.parametrize("option", ["--ignore", "--also"])
def test_a_pattern_that_fits_nothing_is_an_error_and_writes_nothing(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantised(stored(tmp_path / "model", weights(), 1), tmp_path / "out", option, "q_proj") == 2
    assert f"{option} q_proj: no module's name begins so" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_also_takes_what_is_left_alone_otherwise(tmp_path: Path) -> None:
    quantised(stored(tmp_path / "model"), tmp_path / "out", "--also", r".*mlp\.gate$")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    made = tensors_in(tmp_path / "out")
    assert made["model.layers.1.mlp.gate.weight"].dtype == torch.int8
    assert made["model.layers.1.mlp.shared_expert_gate.weight"].dtype == torch.bfloat16
    assert "model.layers.1.mlp.shared_expert_gate" in config["ignore"]
    assert not any("mlp.gate" in name or name.startswith("re:") for name in config["ignore"])


def test_the_description_of_msmodelslim_on_request(tmp_path: Path) -> None:
    quantised(stored(tmp_path / "model"), tmp_path / "out", "--format", "ascend")
    made = tensors_in(tmp_path / "out")
    description = json.loads((tmp_path / "out" / "quant_model_description.json").read_text())
    assert description.pop("model_quant_type") == "W8A8_DYNAMIC" and description.pop("version")
    parts = {name + ending for name in INT8 for ending in ("", "_scale", "_offset")}
    assert description == {name: "W8A8_DYNAMIC" if name in parts else "FLOAT" for name in made}
    assert all(not made[name + "_offset"].any() for name in INT8)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    found = w8a8_in(checkpoint_in(tmp_path / "out"))
    assert found is not None and set(found.weights) == INT8


def test_beside_the_weights_stands_what_stood_there_and_a_manifest_of_it_all(tmp_path: Path) -> None:
    model = stored(tmp_path / "model")
    before = files_in(model)
    quantised(model, tmp_path / "out")
    assert files_in(model) == before
    out = files_in(tmp_path / "out")
    assert out.keys() == (before.keys() - {".gitattributes"}) | {"quantize_manifest.json"}
    assert out["tokenizer.json"] == before["tokenizer.json"]
    manifest = json.loads(out.pop("quantize_manifest.json"))
    assert manifest["files"] == {name: hashlib.sha256(data).hexdigest() for name, data in out.items()}
    index = before.keys() & {"model.safetensors.index.json", ".gitattributes"}
    assert manifest["source"] == {
        name: hashlib.sha256(data).hexdigest() for name, data in before.items() if name not in index
    }
    weight_map = json.loads(out["model.safetensors.index.json"])["weight_map"]
    assert weight_map.keys() == tensors_in(tmp_path / "out").keys()


def test_a_cache_of_links_is_read(tmp_path: Path) -> None:
    model, links = stored(tmp_path / "blobs"), tmp_path / "snapshot"
    links.mkdir()
    for path in model.iterdir():
        (links / path.name).symlink_to(path)
    assert quantised(links, tmp_path / "out") == 0 and quantised(model, tmp_path / "plain") == 0
    assert files_in(tmp_path / "out") == files_in(tmp_path / "plain")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_called_again_it_checks_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = stored(tmp_path / "model"), tmp_path / "out"
    assert quantised(model, out) == quantised(model, out) == 0
    assert "3 were there already" in capsys.readouterr().out
    assert quantised(model, out, "--ignore", ".*q_proj$") == 2
    assert "another copy, with other settings, is there" in capsys.readouterr().err
    shard = next(out.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert quantised(model, out) == 2
    assert f"{shard.name} is not what quantize_manifest.json says" in capsys.readouterr().err


def nan(model: Path) -> None:
    shutil.rmtree(model)
    stored(model, {"a.weight": torch.tensor([[1.0, float("nan")]]), "b.weight": torch.ones(2, 2)}, 1)


def truncated(model: Path) -> None:
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])


def missing(model: Path) -> None:
    sorted(model.glob("*.safetensors"))[1].unlink()


def quantised_before(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))


def without_config(model: Path) -> None:
    (model / "config.json").unlink()


def without_matrices(model: Path) -> None:
    shutil.rmtree(model)
    stored(model, {"norm.weight": torch.ones(3)}, 1)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (truncated, "is truncated: 10 of its"),
        (missing, "lacks model-00002-of-00003.safetensors"),
        (quantised_before, "is quantised already: fp8"),
        (without_config, "config.json cannot be read"),
        (without_matrices, "none of its 1 tensors would be quantised"),
        (nan, "a.weight cannot be quantised: it holds values that are infinite or not a number"),
    ],
)
def test_a_model_that_cannot_be_quantised_is_refused_in_a_line(
    harm: Callable[[Path], None], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = stored(tmp_path / "model")
    harm(model)
    assert quantised(model, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("model", "is within MODEL, which stays as it is"),
        ("model/int8", "is within MODEL, which stays as it is"),
        ("full", "there are other files (mine.txt)"),
        ("file", "that is a file; a folder is wanted"),
        ("/proc/out", "nothing can be made in /proc"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(
    output: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = stored(tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = files_in(tmp_path)
    assert quantised(model, tmp_path / output) == 2
    assert words in capsys.readouterr().err and files_in(tmp_path) == before


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantised(tmp_path / "nothing", tmp_path / "out") == 2
    assert "a model's folder is accepted" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--ignore", "--also"])
def test_a_pattern_that_is_none_is_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantised(stored(tmp_path / "model"), tmp_path / "out", option, "(") == 2
    assert f"{option} (: that is no regular expression" in capsys.readouterr().err


def test_room_is_asked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = stored(tmp_path / "model")
    usage = shutil._ntuple_diskusage(total=10**12, used=10**12 - 10**6, free=10**6)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert quantised(model, tmp_path / "out") == 2
    assert "are needed, 1.00 MB are free" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out, puts = stored(tmp_path / "model"), tmp_path / "out", shard_module._put
    calls = 0

    def full(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return puts(*arguments)

    monkeypatch.setattr(shard_module, "_put", full)
    assert quantised(model, out) == 2
    assert "the disk is full; make room and start the same command again" in capsys.readouterr().err
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert finished and not (out / "config.json").exists()
    monkeypatch.undo()
    assert quantised(model, out) == 0 and quantised(model, tmp_path / "plain") == 0
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    assert files_in(out) == files_in(tmp_path / "plain")
