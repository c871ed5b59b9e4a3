"""W8A8 checkpoints as transformers loads them where npu_patch is applied."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import npu_patch
from npu_patch.checkpoints.safetensors_file import BadCheckpoint
from npu_patch.commands.subject.tiny_model import tiny_model
from npu_patch.ops.w8a8.layer import W8A8Linear
from tests.support.largest_tensor import LargestFloat
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


@pytest.mark.parametrize("device_map", ["cpu", "auto", "npu:0", "disk"])
def test_layers_go_where_the_device_map_says(device_map: str, tmp_path: Path, npu: torch.device) -> None:
    folder = quantised("qwen3_moe", tmp_path)
    npu_patch.apply()
    expected, options = logits(loaded(folder)), {}
    if device_map == "disk":
        parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
        options = {"device_map": {**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"}}
        options["offload_folder"] = str(tmp_path / "offloaded")
    model = loaded(folder, **options or {"device_map": device_map})
    assert model.device.type == ("cpu" if device_map in ("cpu", "disk") else "npu")
    assert apart(logits(model), expected) < (0.02 if model.device.type == "npu" else 1e-9)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize(
    ("dtype", "of_scales"),
    [("auto", torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float32)],
)
def test_scales_have_the_models_dtype_but_float32_beside_float16(
    dtype: Any, of_scales: torch.dtype, model_type: str, tmp_path: Path, npu: torch.device
) -> None:
    folder = quantised(model_type, tmp_path)
    npu_patch.apply()
    model = loaded(folder, dtype=dtype)
    assert {each.dtype for name, each in model.named_parameters() if name.endswith("_scale")} == {of_scales}
    assert model.dtype == (torch.bfloat16 if dtype == "auto" else dtype)
    assert apart(logits(model), logits(loaded(folder))) < 0.02
    assert apart(logits(model.to(npu)), logits(loaded(folder))) < 0.02


def test_float32_scales_stay_so(tmp_path: Path, npu: torch.device) -> None:
    folder = quantised("qwen3_moe", tmp_path, dtype=torch.float32)
    npu_patch.apply()
    model = loaded(folder, dtype=torch.bfloat16)
    assert {each.dtype for name, each in model.named_parameters() if name.endswith("_scale")} == {torch.float32}
    assert apart(logits(model.to(npu)), logits(loaded(folder))) < 0.03


@pytest.mark.parametrize("ignored", [r".*experts\.", r".*layers\.0\.", r".*(q|down)_proj"])
@pytest.mark.parametrize("written", FORMATS)
def test_what_the_checkpoint_has_in_bfloat16_is_loaded_so(
    ignored: str, written: str, tmp_path: Path, npu: torch.device
) -> None:
    if ignored.endswith("down_proj)") or ignored.endswith("_proj"):
        ignored += "(?!.*experts)" if written == "packed" else ""
    folder = quantised(
        "qwen3_moe", tmp_path, "--ignore", ignored if "q|" not in ignored else r".*q_proj", *FORMATS[written]
    )
    npu_patch.apply()
    model, said = loaded(folder, output_loading_info=True)
    assert not any(said.values())
    original = loaded(tmp_path / "original").state_dict()
    floats = {
        name for name, each in model.state_dict().items() if each.dtype == torch.bfloat16 and "_scale" not in name
    }
    assert floats & {name for name in original if re.match(ignored, name)}
    assert all(torch.equal(model.state_dict()[name], original[name]) for name in floats)
    assert apart(logits(model), logits(loaded(tmp_path / "original"))) < 0.05


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """The checkpoint with its tensors in one file, changed."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(
        {name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


Q, DOWN, EXPERT = (
    f"model.layers.1.{name}.weight" for name in ("self_attn.q_proj", "mlp.experts.2.down_proj", "mlp.experts.4.up_proj")
)
BAD: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no scale": (lambda tensors: tensors.pop(f"{Q}_scale"), f"has no {Q}_scale|{Q} is int8 without"),
    "no weight": (lambda tensors: tensors.pop(Q), f"has no {Q}"),
    "neither": (lambda tensors: (tensors.pop(Q), tensors.pop(f"{Q}_scale")), f"has no {Q}"),
    "scales of another layer": (
        lambda tensors: tensors.update({f"{Q}_scale": tensors[f"{Q}_scale"][:-1]}),
        rf"{Q}_scale is \[47, 1\]",
    ),
    "a weight of other sizes": (
        lambda tensors: tensors.update({Q: tensors[Q][:-1], f"{Q}_scale": tensors[f"{Q}_scale"][:-1]}),
        rf"{Q} is \[47, 48\], and {Q} \[48, 48\]",
    ),
    "no scale of an expert": (
        lambda tensors: tensors.pop(f"{EXPERT}_scale"),
        f"has no {EXPERT}_scale|{EXPERT} is int8",
    ),
    "an expert too few": (
        lambda tensors: (tensors.pop(EXPERT), tensors.pop(f"{EXPERT}_scale")),
        r"5 of 6 int8 weights .*up_proj",
    ),
    "an expert in bfloat16": (
        lambda tensors: tensors.update({DOWN: tensors[DOWN].bfloat16()}) or tensors.pop(f"{DOWN}_scale"),
        f"{DOWN} is not",
    ),
    "an expert of other sizes": (
        lambda tensors: tensors.update({DOWN: tensors[DOWN][:, :-1]}),
        rf"{DOWN} is \[48, 39\], not \[48, 40\]",
    ),
    "an int8 embedding": (
        lambda tensors: tensors.update(
            {
                "model.embed_tokens.weight": torch.zeros(101, 48, dtype=torch.int8),
                "model.embed_tokens.weight_scale": torch.ones(101, 1),
            }
        ),
        "model.embed_tokens.weight is int8, and Embedding is no layer that computes with int8 weights",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_missing_or_of_another_shape_is_an_error_that_names_it(
    bad: str, tmp_path: Path, npu: torch.device
) -> None:
    change, message = BAD[bad]
    folder = rewritten(quantised("qwen3_moe", tmp_path), change)
    npu_patch.apply()
    with pytest.raises(BadCheckpoint, match=message):
        loaded(folder)


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("model_type", DENSE)
def test_what_compressed_tensors_wrote_is_loaded_as_int8_unless_it_is_to_be_dequantised(
    model_type: str, dequantize: bool, tmp_path: Path, npu: torch.device
) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    from npu_patch.commands.subject.tiny_model import tiny_model
    from tests.commands.quantize.test_models import written_by_compressed_tensors

    model = tiny_model(model_type).bfloat16()
    expected = logits(model)
    written_by_compressed_tensors(model, tmp_path / "theirs")
    npu_patch.apply()
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    found, said = loaded(tmp_path / "theirs", output_loading_info=True, **options)
    assert not any(said.values())
    assert any(type(each) is W8A8Linear for each in found.modules()) == (not dequantize)
    assert any(each.dtype == torch.int8 for each in found.parameters()) == (not dequantize)
    assert 0 < apart(logits(found), expected) < 0.05


def test_no_float_of_a_whole_int8_weight_exists_while_loading(
    tmp_path: Path, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantised("qwen3_moe", tmp_path)
    npu_patch.apply()
    loaded(folder)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # threads of their own have modes of their own
    with LargestFloat() as largest:
        model = loaded(folder)
    int8 = [each.numel() for each in model.parameters() if each.dtype == torch.int8]
    others = [each.numel() for each in model.parameters() if each.dtype != torch.int8]
    assert 0 < largest.elements <= max(others) < max(int8)


def test_a_truncated_shard_is_an_error_that_names_the_file(tmp_path: Path, npu: torch.device) -> None:
    folder = quantised("qwen3_moe", tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    npu_patch.apply()
    with pytest.raises(BadCheckpoint, match=f"{shard.name} is truncated: 100 of its"):
        loaded(folder)


def described(folder: Path, **changed: Any) -> Path:
    """With another `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    for name in ("weights", "input_activations"):
        group[name] = changed.pop(name, group[name])
    config["quantization_config"] |= changed
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "other",
    [
        {"quant_method": "fp8"},
        {"format": "pack-quantized"},
        {"weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False}},
        {
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "tensor",
                "dynamic": False,
            }
        },
        {"kv_cache_scheme": {"num_bits": 8, "type": "float"}},
    ],
)
def test_other_schemes_are_transformers_own(other: dict[str, Any], tmp_path: Path, npu: torch.device) -> None:
    folder = described(quantised("qwen3", tmp_path), **other)
    report = npu_patch.apply()
    (outcome,) = [each for each in report.outcomes if each.patch == "w8a8_loading"]
    with contextlib.suppress(ImportError, ValueError):  # what they say of it without their packages
        assert not any(type(each) is W8A8Linear for each in loaded(folder).modules())
    assert sum(outcome.calls.fell_through.values()) == 1 and outcome.calls.ran == 0


def test_a_description_with_another_scheme_is_an_error(tmp_path: Path, npu: torch.device) -> None:
    """transformers, which reads no such description, would take the int8 for floats."""
    folder = quantised("qwen3", tmp_path, "--format", "ascend")
    file = folder / "quant_model_description.json"
    file.write_text(file.read_text().replace("W8A8_DYNAMIC", "W8A8"))
    npu_patch.apply()
    with pytest.raises(BadCheckpoint, match="the scheme W8A8 is unknown; known is W8A8_DYNAMIC"):
        loaded(folder)


def test_an_offset_that_is_not_zero_is_an_error_that_names_it(tmp_path: Path, npu: torch.device) -> None:
    folder = rewritten(
        quantised("qwen3_moe", tmp_path, "--format", "ascend"), lambda tensors: tensors[f"{Q}_offset"][1].fill_(1)
    )
    npu_patch.apply()
    with pytest.raises(BadCheckpoint, match=f"{Q}_offset is not zero everywhere"):
        loaded(folder)


def test_files_with_msmodelslims_names_are_found(tmp_path: Path, npu: torch.device) -> None:
    folder = rewritten(quantised("qwen3", tmp_path, "--format", "ascend"), lambda tensors: None)
    npu_patch.apply()
    expected = logits(loaded(folder))
    (folder / "model.safetensors").rename(folder / "quant_model_weights.safetensors")
    model = loaded(folder)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded(tmp_path / "again")), expected)


def test_a_cache_of_links_is_a_model(tmp_path: Path, npu: torch.device) -> None:
    folder = quantised("qwen3_moe", tmp_path)
    snapshot = tmp_path / "models--some--model" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = tmp_path / f"blob{number}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(blob)
    npu_patch.apply()
    assert any(type(each) is W8A8Linear for each in loaded(snapshot).modules())


def test_a_tied_head_stays_tied(tmp_path: Path, npu: torch.device) -> None:
    from npu_patch.commands import main
    from npu_patch.commands.subject.tiny_model import auto_class, tiny_config

    config = tiny_config("qwen3", False)
    config.tie_word_embeddings = True
    auto_class(config).from_config(config).bfloat16().save_pretrained(tmp_path / "original")
    assert main(["quantize", str(tmp_path / "original"), str(tmp_path / "int8")]) == 0
    npu_patch.apply()
    model = loaded(tmp_path / "int8")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert apart(logits(model), logits(loaded(tmp_path / "original"))) < 0.05


def test_a_head_of_its_own_is_new_and_a_base_model_has_none(tmp_path: Path, npu: torch.device) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    folder = quantised("qwen3_moe", tmp_path)
    npu_patch.apply()
    _, said = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert said["missing_keys"] == {"score.weight"}
    base = AutoModel.from_pretrained(folder)
    assert any(each.dtype == torch.int8 for each in base.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_compute_the_same(copied: Callable[[Any], Any], tmp_path: Path, npu: torch.device) -> None:
    folder = quantised("qwen3_moe", tmp_path)
    npu_patch.apply()
    model = loaded(folder)
    assert torch.equal(logits(copied(model)), logits(model))


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
def test_the_language_model_within_a_model_for_images_is_int8(
    model_type: str, tmp_path: Path, npu: torch.device
) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    from npu_patch.commands import main
    from npu_patch.commands.subject.tiny_model import tiny_config

    tower = {"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "out_hidden_size": 48}
    text = tiny_config(f"{model_type}_text", True).to_dict()
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=tower | {"num_position_embeddings": 16})
    original = AutoModelForImageTextToText.from_config(config).bfloat16().eval()
    original.save_pretrained(tmp_path / "original")
    assert main(["quantize", str(tmp_path / "original"), str(tmp_path / "int8")]) == 0
    npu_patch.apply()
    model, said = AutoModelForImageTextToText.from_pretrained(tmp_path / "int8", dtype="auto", output_loading_info=True)
    assert not any(said.values())
    int8 = {name for name, each in model.named_parameters() if each.dtype == torch.int8}
    assert int8 and all(name.startswith("model.language_model.layers.") for name in int8)
    assert 0 < apart(logits(model), logits(original)) < 0.05
    text_alone, said = loaded(tmp_path / "int8", output_loading_info=True)
    assert not any(said.values()) and torch.equal(logits(text_alone), logits(model))


@pytest.mark.parametrize("kind", ["compressed-tensors", "ascend"])
def test_a_model_that_was_given_leaves_loading_as_it_was(kind: str, tmp_path: Path, npu: torch.device) -> None:
    folder = quantised("qwen3", tmp_path, "--format", kind)
    npu_patch.apply(tiny_model("qwen3").to(npu))
    assert any(type(each) is W8A8Linear for each in loaded(folder).modules())


@pytest.mark.filterwarnings("ignore")
def test_int8_that_transformers_took_for_floats_is_named(tmp_path: Path, npu: torch.device) -> None:
    model = loaded(quantised("qwen3", tmp_path, "--format", "ascend")).to(npu)
    assert any("takes them for floats" in line for line in npu_patch.apply(model).warnings)
    npu_patch.restore()
    npu_patch.apply()
    right = loaded(tmp_path / "int8").to(npu)
    assert not any("takes them for floats" in line for line in npu_patch.apply(right).warnings)


def test_apply_twice_is_apply_once(npu: torch.device) -> None:
    first, second = npu_patch.apply(), npu_patch.apply()
    of_loading = [[each.site for each in report.outcomes if each.patch == "w8a8_loading"] for report in (first, second)]
    assert of_loading == [["transformers.modeling_utils.get_hf_quantizer"]] * 2


def test_a_new_process_that_applies_unasked_loads_int8(tmp_path: Path, simulated: None) -> None:
    import os
    import subprocess
    import sys

    folder = quantised("qwen3_moe", tmp_path)
    case = tmp_path / "case.py"
    case.write_text(
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')\n"
        "print(sorted({str(each.dtype) for each in model.parameters()}))\n"
    )
    told = {**os.environ, "TWINKLE_NPU_AUTO": "1", "PYTHONPATH": str(Path(npu_patch.__file__).parents[1])}
    command = [sys.executable, "-m", "npu_patch.simulator", str(case), str(folder)]
    ended = subprocess.run(command, env=told, capture_output=True, text=True, timeout=200)
    assert "torch.int8" in ended.stdout, ended.stderr[-3000:]
