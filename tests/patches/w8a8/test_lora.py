"""LoRA on int8 weights, through peft as it is: every adapter has its gradient, and nothing is merged into int8."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import npu_patch
from npu_patch.commands import main
from npu_patch.ops.w8a8.dequantised import dequantised
from npu_patch.ops.w8a8.layer import W8A8Linear
from tests.support.gradients import relative_error
from tests.support.lora_models import fell_through, ran
from tests.support.w8a8_models import IDS, apart, loaded, quantised

FAMILIES = ("qwen3", "qwen3_moe", "qwen3_5_text", "qwen3_next")
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "in_proj_qkvz", "in_proj_qkv")
NAMES += ("in_proj_z", "out_proj")


@pytest.fixture(autouse=True)
def nothing_applied() -> Iterator[None]:
    yield
    npu_patch.restore()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            made[family] = quantised(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder_of


def base(folder: Path, device: Any) -> Any:
    with npu_patch.applied():
        return loaded(folder).to(device)


def adapted(model: nn.Module, names: tuple[str, ...] = NAMES, dropout: float = 0.0, **config: Any) -> Any:
    torch.manual_seed(0)
    paths = [path for path, _ in model.named_modules()]
    targets = [name for name in names if any(path.endswith(name) for path in paths)]
    given = {"init_lora_weights": False, **config}
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=3, lora_dropout=dropout, target_modules=targets, **given)
    ).train()


def a_step(model: Any) -> dict[str, Tensor | None]:
    """Loss and the gradient of each adapter."""
    model.zero_grad()
    ids = IDS.to(model.device)
    torch.manual_seed(5)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    return {"loss": loss.detach(), **trained}


def in_a_row(found: dict[str, Tensor | None]) -> Tensor:
    return torch.cat([each.detach().double().cpu().flatten() for each in found.values() if each is not None])


def dense(model: Any) -> Any:
    """The same with weights times their scales, and no rounding of inputs."""
    model = copy.deepcopy(model)
    for path, layer in list(model.named_modules()):
        if type(layer) is W8A8Linear:
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device)
            plain.weight = nn.Parameter(dequantised(layer.weight, layer.weight_scale), requires_grad=False)
            plain.bias = layer.bias
            model.set_submodule(path, plain)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_has_a_gradient_as_near_to_the_dense_models_as_int8_is(
    family: str, folders: Any, npu: torch.device, tmp_path: Path
) -> None:
    folder = folders(family)
    int8 = adapted(base(folder, npu))
    npu_patch.apply(int8)
    found = a_step(int8)
    assert not [name for name, each in found.items() if each is None or not each.any()]
    assert main(["dequantize", str(folder), str(tmp_path / "plain")]) == 0
    plain = a_step(adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").to(npu)))
    original = a_step(adapted(AutoModelForCausalLM.from_pretrained(folder.parent / "original", dtype="auto").to(npu)))
    of_int8 = apart(in_a_row(plain), in_a_row(original))
    assert 0 < apart(in_a_row(found), in_a_row(plain)) < 2 * of_int8 < 0.2


PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("parameters", [PARAMETERS, PARAMETERS[1:]], ids=["both", "down"])
@pytest.mark.parametrize("half", [False, True], ids=["float32 adapters", "bfloat16 adapters"])
def test_adapters_of_int8_experts_are_those_of_the_dense_experts(
    parameters: list[str], half: bool, folders: Any, npu: torch.device, tmp_path: Path
) -> None:
    folder = folders("qwen3_moe")
    assert main(["dequantize", str(folder), str(tmp_path / "plain")]) == 0
    steps = []
    for model in (base(folder, npu), AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").to(npu)):
        model = adapted(model, (), target_parameters=parameters)
        for name, each in model.named_parameters():
            if "lora_" in name and half:
                each.data = each.data.bfloat16()
        with npu_patch.applied(model):
            steps.append(a_step(model))
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
            again = a_step(model)
            assert all(torch.equal(again[name], each) for name, each in steps[-1].items() if each is not None)
    int8, dense_ones = steps
    assert all(each is not None and each.any() for each in int8.values())
    trained = [name for name in int8 if "lora_" in name]
    assert len(trained) == 4 * len(parameters)
    for name in trained:
        assert apart(int8[name].double(), dense_ones[name].double()) < 0.1, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_adapters_of_int8_experts_have_any_rank(
    rank: int, device: str, dtype: torch.dtype, folders: Any, npu: torch.device
) -> None:
    with npu_patch.applied():
        model = loaded(folders("qwen3_moe"), dtype=dtype).to(npu if device == "npu" else device)
    config = LoraConfig(r=rank, target_modules=[], target_parameters=PARAMETERS, init_lora_weights=False)
    model = get_peft_model(model, config).train()
    with npu_patch.applied(model, device=device):
        assert all(each is not None and each.any() for each in a_step(model).values())


def test_without_npu_patch_adapters_of_int8_experts_are_an_error_and_no_silence(
    folders: Any, npu: torch.device
) -> None:
    model = adapted(base(folders("qwen3_moe"), npu), (), target_parameters=PARAMETERS)
    with pytest.raises(RuntimeError, match=r"call npu_patch\.apply"):
        a_step(model)


HOW: dict[str, dict[str, Any]] = {
    "all": {},
    "q and v": {"names": ("q_proj", "v_proj")},
    "dropout": {"dropout": 0.3},
    "rslora": {"use_rslora": True},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("half", [False, True], ids=["float32 adapters", "bfloat16 adapters"])
def test_one_function_of_layer_and_adapter_is_what_peft_computes_with_the_layer(
    how: str, autocast: bool, half: bool, folders: Any, npu: torch.device
) -> None:
    model = adapted(base(folders("qwen3"), npu), **HOW[how])
    for name, each in model.named_parameters():
        if "lora_" in name and half:
            each.data = each.data.bfloat16()
    steps = []
    for fused in (False, True):
        with npu_patch.applied(model, lora=fused) as report, torch.autocast("npu", torch.bfloat16, enabled=autocast):
            steps.append(in_a_row(a_step(model)))
        assert not fused or (ran(report) and not fell_through(report))
    assert apart(*steps) < 0.01


def test_the_ways_of_a_training_job_give_the_same_bits(folders: Any, npu: torch.device) -> None:
    model = base(folders("qwen3"), npu)
    npu_patch.apply(model)  # before there are adapters
    model = adapted(model, dropout=0.2)
    plain = in_a_row(a_step(model))
    npu_patch.apply(model)
    assert torch.equal(in_a_row(a_step(model)), plain)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert torch.equal(in_a_row(a_step(model)), plain)
        model.gradient_checkpointing_disable()
    with torch.no_grad():
        torch.manual_seed(5)
        ids = IDS.to(npu)
        assert torch.equal(model(input_ids=ids, labels=ids).loss.double().cpu(), plain[0])
    npu_patch.restore()
    assert apart(in_a_row(a_step(model)), plain) < 0.01


def test_adapters_are_saved_and_loaded_on_an_int8_model(folders: Any, npu: torch.device, tmp_path: Path) -> None:
    folder = folders("qwen3_moe")
    model = adapted(base(folder, npu)).eval()
    npu_patch.apply(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(folder, npu), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS.to(npu)).logits, model(IDS.to(npu)).logits)


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_adapter, safely": lambda model: model.merge_adapter(safe_merge=True),
    "one layer": lambda model: next(each for each in model.modules() if hasattr(each, "lora_A")).merge(),
    "one layer, safely": lambda model: next(each for each in model.modules() if hasattr(each, "lora_A")).merge(True),
}
MORE = {"an expert's": {"target_parameters": PARAMETERS}}
MERGES["an expert's"] = lambda model: model.base_model.model.model.layers[0].mlp.experts.merge()


@pytest.mark.parametrize("how", MERGES)
def test_merging_is_refused_before_anything_is_merged(how: str, folders: Any, npu: torch.device) -> None:
    family = "qwen3_moe" if how.startswith("an expert") else "qwen3"
    model = adapted(base(folders(family), npu), (*NAMES, "lm_head"), **MORE.get(how, {}))  # the head is no int8
    npu_patch.apply(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"adapters cannot be merged into the int8 weights of .*npu_patch dequantize"):
        MERGES[how](model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not any(getattr(each, "merged", False) for each in model.modules())


def test_an_adapter_is_merged_into_a_dequantised_copy(folders: Any, npu: torch.device, tmp_path: Path) -> None:
    folder = folders("qwen3")
    model = adapted(base(folder, npu)).eval()
    model.save_pretrained(tmp_path / "adapter")
    npu_patch.apply(model)
    assert main(["dequantize", str(folder), str(tmp_path / "plain")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").to(npu)
    merged = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    with torch.no_grad():
        assert apart(merged(IDS.to(npu)).logits.double(), model(IDS.to(npu)).logits.double()) < 0.05


def test_what_asks_for_the_weight_gets_it_times_its_scales(folders: Any, npu: torch.device) -> None:
    """DoRA's norms are of the weight that the layer multiplies by."""
    int8 = base(folders("qwen3"), npu)
    steps = []
    with npu_patch.applied(int8):
        for model in (int8, dense(int8)):
            steps.append(in_a_row(a_step(adapted(model, use_dora=True))))
    assert apart(*steps) < 0.1


def of_one_rank(tensor: Tensor | None) -> Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("mixed", [False, True], ids=["", "mixed precision"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_fully_shard_keeps_weights_int8_and_gradients_what_they_are(
    mixed: bool, family: str, folders: Any, npu: torch.device, tmp_path: Path
) -> None:
    model = adapted(base(folders(family), npu)).bfloat16()
    npu_patch.apply(model)
    plain = a_step(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    try:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        held = {name: each.dtype for name, each in model.named_parameters() if each.dtype is torch.int8}
        assert held
        for _ in range(2):
            found = {name: of_one_rank(each) for name, each in a_step(model).items()}
            assert found.keys() == plain.keys()
            assert relative_error(in_a_row(found), in_a_row(plain)) < 1e-2
    finally:
        dist.destroy_process_group()
