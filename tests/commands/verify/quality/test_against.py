"""python -m npu_patch verify MODEL --against ORIGINAL: what a quantised model lost, and where it says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from npu_patch.commands import main
from npu_patch.commands.subject.tiny_model import tiny_model
from npu_patch.commands.verify.quality.text import tokens_in
from npu_patch.ops.w8a8.layer import W8A8Linear
from tests.commands.quantize.checkpoints import tensors_in

TYPES = ["qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_next"]
TOKENS, LENGTH = 200, 64
KINDS = {
    "qwen3": {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"},
    "qwen3_moe": {"self_attn.k_proj", "mlp.experts"},
    "qwen3_5_text": {"linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.out_proj", "self_attn.v_proj"},
    "qwen3_next": {"linear_attn.in_proj_qkvz", "mlp.experts", "mlp.shared_expert.down_proj"},
}
Folders = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Of a tiny model and its quantised copy, made once."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def of(model_type: str = "qwen3", kind: str = "compressed-tensors") -> tuple[Path, Path]:
        if (model_type, kind) not in made:
            folder = tmp_path_factory.mktemp(model_type)
            model = tiny_model(model_type, every_expert=True).bfloat16()
            model.save_pretrained(folder / "original", max_shard_size="60KB")
            assert main(["quantize", str(folder / "original"), str(folder / "int8"), "--format", kind]) == 0
            made[model_type, kind] = folder / "original", folder / "int8"
        return made[model_type, kind]

    return of


def code_of(model: Path | str, original: Path | str, *options: str) -> int:
    sizes = ["--tokens", str(TOKENS), "--length", str(LENGTH), "--device", "cpu"]
    return main(["verify", str(model), "--against", str(original), *sizes, *options])


def content_of(capsys: pytest.CaptureFixture[str], model: Path, original: Path, *options: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = code_of(model, original, "--json", *options)
    return code, json.loads(capsys.readouterr().out)


def changed(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    shutil.copytree(folder, to)
    tensors = tensors_in(folder)
    change(tensors)
    for file in to.glob("model*.safetensors*"):
        file.unlink()
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("kind", ["compressed-tensors", "ascend"])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_int8_layer_is_measured_and_costs_the_steps_of_int8(
    model_type: str, kind: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    original, int8 = folders(model_type, kind)
    code, content = content_of(capsys, int8, original)
    assert code == 0 and content["fine"] and content["notes"] == []
    assert 0 < content["logits"]["relative_error"] < 0.03
    assert {each["kind"] for each in content["kinds"]} >= KINDS[model_type]
    on_disk = {name for name, tensor in tensors_in(int8).items() if tensor.dtype == torch.int8 and "offset" not in name}
    expected = {name.partition(".experts.")[0] + ".experts" if ".experts." in name else name for name in on_disk}
    assert {each["name"] for each in content["layers"]} == {name.removesuffix(".weight") for name in expected}
    for each in content["layers"]:
        assert each["int8"] and each["calls"] == 4
        assert 0.003 < each["weights_error"] < each["error"] < 0.03  # rounded inputs cost about what weights do


@pytest.mark.parametrize("model_type", TYPES)
def test_a_model_against_itself_has_lost_nothing(
    model_type: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    original, _ = folders(model_type)
    code, content = content_of(capsys, original, original, "--max-logits-error", "0", "--max-perplexity-ratio", "1")
    assert code == 0 and content["layers"] == []
    assert content["logits"] == {"relative_error": 0, "largest_error": 0, "same_argmax": 1, "kl": 0, "largest_kl": 0}
    assert content["perplexity"]["ratio"] == 1 and content["perplexity"]["model"] > 1


DAMAGED = {
    "qwen3": "model.layers.1.self_attn.v_proj",
    "qwen3_moe": "model.layers.0.mlp.experts",
    "qwen3_5_text": "model.layers.0.linear_attn.in_proj_z",
}


@pytest.mark.parametrize("model_type", DAMAGED)
def test_a_damaged_layer_costs_most_and_turns_the_exit_code(
    model_type: str, folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, int8 = folders(model_type)
    layer = DAMAGED[model_type]

    def doubled(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.startswith(layer) and name.endswith("_scale"):
                tensor *= 2

    damaged = changed(int8, tmp_path / "damaged", doubled)
    limits = ("--max-logits-error", "0.04")
    assert code_of(int8, original, *limits) == 0
    code, content = content_of(capsys, damaged, original, *limits)
    assert code == 1 and not content["fine"]
    assert [each for each in content["failures"] if "--max-logits-error" in each]
    assert content["layers"][0]["name"] == layer and content["layers"][0]["error"] > 0.2
    assert content["layers"][1]["error"] < 0.03
    assert code_of(damaged, original, "--max-logits-error", "10", "--max-perplexity-ratio", "10") == 0
    assert code_of(damaged, original, "--max-logits-error", "10", "--max-perplexity-ratio", "0.5") == 1
    text = capsys.readouterr().out
    assert "within the limits" in text and "FAIL: the perplexity is" in text and layer in text


def sure(tensors: dict[str, Tensor]) -> None:
    """A model that is not near to saying that all tokens are as likely."""
    tensors["lm_head.weight"] *= 8


def noisy(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            tensor += torch.randn(tensor.shape, generator=generator) * tensor.float().std() * 0.1


@torch.no_grad()
def test_what_is_said_of_logits_is_what_another_computation_gives(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = changed(folders()[0], tmp_path / "original", sure)
    other = changed(original, tmp_path / "other", noisy)
    code, content = content_of(capsys, other, original)
    assert code == 1
    ids = torch.tensor(tokens_in(original, None, 101, TOKENS).ids)
    models = [AutoModelForCausalLM.from_pretrained(each).eval() for each in (original, other)]
    logits = [torch.cat([m(piece[None]).logits[0] for piece in ids.split(LENGTH)]).double() for m in models]
    predicting = torch.tensor([i % LENGTH != LENGTH - 1 and i != TOKENS - 1 for i in range(TOKENS)])
    following = ids.roll(-1)[predicting]
    perplexities = [float(cross_entropy(each[predicting], following).exp()) for each in logits]
    said = content["perplexity"]
    assert [said["original"], said["model"]] == pytest.approx(perplexities, rel=1e-5)
    assert said["ratio"] == pytest.approx(perplexities[1] / perplexities[0], rel=1e-5)
    centred, found = (each - each.mean(-1, keepdim=True) for each in logits)
    errors = content["logits"]
    assert errors["relative_error"] == pytest.approx(float((found - centred).norm() / centred.norm()), rel=1e-4)
    largest = float((found - centred).abs().max() / centred.square().mean().sqrt())
    assert errors["largest_error"] == pytest.approx(largest, rel=1e-4)
    log_q, log_p = logits[1].log_softmax(-1), logits[0].log_softmax(-1)
    assert errors["kl"] == pytest.approx(float(kl_div(log_q, log_p, reduction="batchmean", log_target=True)), rel=1e-3)
    assert errors["same_argmax"] == float((logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean()) < 1


def in_int8(original: Path, int8: Path) -> torch.nn.Module:
    """The original with its linear layers replaced."""
    model = AutoModelForCausalLM.from_pretrained(original).eval()
    tensors = tensors_in(int8)
    for name, module in list(model.named_modules()):
        if tensors.get(f"{name}.weight", torch.empty(0)).dtype == torch.int8:
            layer = W8A8Linear(module.in_features, module.out_features, dtype=torch.bfloat16)
            layer.weight.data, layer.weight_scale.data = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
            model.set_submodule(name, layer)
    return model


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_5_text"])
def test_logits_and_layers_are_as_far_away_as_int8_products_make_them(
    model_type: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    original, int8 = folders(model_type)
    _, content = content_of(capsys, int8, original)
    ids = torch.tensor(tokens_in(original, None, 101, TOKENS).ids).split(LENGTH)
    exact, found = AutoModelForCausalLM.from_pretrained(original).eval(), in_int8(original, int8)
    errors: dict[str, list[float]] = {}

    def compared(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            difference = found.get_submodule(name)(args[0]).double() - output.double()
            errors.setdefault(name, []).append(float(difference.square().sum()))
            errors.setdefault(f"{name} itself", []).append(float(output.double().square().sum()))

        return hook

    for name, module in found.named_modules():
        if isinstance(module, W8A8Linear):
            exact.get_submodule(name).register_forward_hook(compared(name))
    logits = [torch.cat([model(piece[None]).logits[0] for piece in ids]).double() for model in (exact, found)]
    wanted, got = (each - each.mean(-1, keepdim=True) for each in logits)
    relative = float((got - wanted).norm() / wanted.norm())
    assert content["logits"]["relative_error"] == pytest.approx(relative, rel=1e-3)
    for each in content["layers"]:
        squares, itself = (sum(errors[name]) for name in (each["name"], f"{each['name']} itself"))
        assert each["error"] == pytest.approx((squares / itself) ** 0.5, rel=1e-3)


@pytest.mark.parametrize("model_type", ["qwen3", "qwen3_next"])
def test_a_devices_own_int8_operators_are_measured(
    model_type: str,
    folders: Folders,
    npu: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, int8 = folders(model_type)
    genuine, asked = torch.ops.npu.npu_dynamic_quant, []
    monkeypatch.setattr(torch.ops.npu, "npu_dynamic_quant", lambda x: asked.append(1) or genuine(x))
    _, expected = content_of(capsys, int8, original)
    assert not asked
    code, content = content_of(capsys, int8, original, "--device", "npu")
    assert code == 0 and content["device"] != expected["device"] and len(asked) > 4 * len(content["layers"])
    error = expected["logits"]["relative_error"]
    assert content["logits"]["relative_error"] == pytest.approx(error, rel=0.1)


def test_a_layer_that_is_no_int8_is_measured_too_and_other_norms_are_noted(
    folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, _ = folders()

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] *= 1.5
        tensors["model.layers.1.input_layernorm.weight"] *= 1.1

    other = changed(original, tmp_path / "other", change)
    _, content = content_of(capsys, other, original)
    (layer,) = content["layers"]
    assert layer["name"] == "model.layers.0.mlp.up_proj" and not layer["int8"]
    assert layer["error"] == layer["weights_error"] == pytest.approx(0.5, abs=0.01)
    assert "1 norms or embeddings differ too (model.layers.1.input_layernorm)" in content["notes"][0]


def test_logits_that_are_not_numbers_fail(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    original, int8 = folders()

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight_scale"][0] = torch.nan

    broken = changed(int8, tmp_path / "broken", change)
    code, content = content_of(capsys, broken, original)
    assert code == 1 and "infinite or not a number" in content["failures"][0]
    assert content["layers"][0]["name"] == "model.layers.0.mlp.up_proj" and content["layers"][0]["error"] is None


def edited(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return edit


def shortened(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-10])


def without_a_weight(folder: Path) -> None:
    tensors = tensors_in(folder)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors.pop("model.layers.1.mlp.up_proj.weight_scale", None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def not_a_number(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, file, metadata={"format": "pt"})


def with_a_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("which", "damage", "said"),
    [
        ("int8", shutil.rmtree, "there is no such folder"),
        ("original", shutil.rmtree, "there is no such folder"),
        ("int8", shortened, "is truncated"),
        ("original", shortened, "is truncated"),
        ("int8", edited(model_type="llama"), "model_type is llama, not qwen3"),
        ("int8", edited(vocab_size=102), "vocab_size is 102, not 101"),
        ("int8", edited(model_type="no_such_type"), "its config.json cannot be used"),
        ("int8", without_a_weight, "has no model.layers.1.mlp.up_proj.weight"),
        ("original", without_a_weight, "lacks 1 weights of a Qwen3ForCausalLM: model.layers.1.mlp.up_proj.weight"),
        ("original", not_a_number, "its own logits are infinite or not a number"),
        ("int8", with_a_broken_tokenizer, "its tokenizer cannot be used"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    which: str,
    damage: Callable[[Path], None],
    said: str,
    folders: Folders,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder, name in zip(folders(), ("original", "int8"), strict=True):
        shutil.copytree(folder, tmp_path / name)
    damage(tmp_path / which)
    capsys.readouterr()
    assert code_of(tmp_path / "int8", tmp_path / "original") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("npu_patch verify: ")]
    assert len(lines) == 1 and said in lines[0] and str(tmp_path) in lines[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", "1"], "--tokens 1: accepted are numbers from 2"),
        (["--length", "1"], "--length 1: accepted are numbers from 2"),
        (["--length", "129"], "--length 129: the model's configuration allows for 128 tokens"),
        (["--max-logits-error", "-1"], "--max-logits-error -1.0: accepted are numbers from 0"),
        (["--max-perplexity-ratio", "nan"], "--max-perplexity-ratio nan: accepted are numbers from 0"),
        (["--seeds", "2"], "--seeds 2: with --against"),
        (["--dtype", "float32"], "with --against"),
        (["--text", "/no/such/file"], "--text /no/such/file cannot be read"),
    ],
)
def test_options_that_say_nothing_sensible_are_refused(
    options: list[str], said: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    original, int8 = folders()
    assert code_of(int8, original, *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tokens", "--length", "--max-logits-error", "--max-perplexity-ratio", "--text"])
def test_what_belongs_to_a_comparison_is_refused_without_an_original(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "qwen3", "--device", "cpu", option, "3"]) == 2
    assert f"{option}: accepted beside --against" in capsys.readouterr().err


def test_a_quantised_original_is_refused(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    original, int8 = folders()
    assert code_of(original, int8) == 2
    assert "is quantised itself" in capsys.readouterr().err
