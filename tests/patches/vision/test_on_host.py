"""What models for images ask about grids and token ids: right, and with one copy to the host per step."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import models

import npu_patch
from npu_patch import simulator
from npu_patch.patches.vision import on_host
from tests.support.vision_cases import FULL, IMAGES, LANGUAGE, PACKED, VIDEO, batch_of, made, pictures_of

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


def fresh(batch: dict[str, Tensor], npu: torch.device) -> dict[str, Tensor]:
    """As a loader hands over each step: tensors that nobody has read."""
    return {name: tensor.to(npu) for name, tensor in batch.items()}


def step(model: torch.nn.Module, batch: dict[str, Tensor]) -> None:
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("pictures", [IMAGES, PACKED, VIDEO])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_copies_to_the_host_once(family: str, pictures: str, npu: torch.device) -> None:
    if pictures not in pictures_of(family):
        pytest.skip(f"{family} takes no such batch")
    model = made(family, LANGUAGE).to(npu).train()
    batch = batch_of(copy.deepcopy(model).cpu(), family, pictures)
    step(model, fresh(batch, npu))
    given = fresh(batch, npu)
    with simulator.count() as unpatched:
        step(model, given)
    npu_patch.apply(model)
    step(model, fresh(batch, npu))
    given = fresh(batch, npu)
    with simulator.count() as patched:
        step(model, given)
    assert unpatched.host_copies > 5
    assert patched.host_copies == 1, patched.host_copies_by_op


def test_too_few_image_tokens_are_the_error_that_they_were(npu: torch.device) -> None:
    model = made("qwen2_5_vl", FULL).to(npu)
    batch = fresh(batch_of(copy.deepcopy(model).cpu(), "qwen2_5_vl", IMAGES), npu)
    image = model.config.image_token_id
    place = (batch["input_ids"] == image).nonzero()[0]
    batch["input_ids"][place[0], place[1]] = 3
    with pytest.raises(ValueError) as unpatched:
        model(**batch)
    npu_patch.apply(model)
    with pytest.raises(ValueError) as patched:
        model(**batch)
    assert str(patched.value) == str(unpatched.value)


def test_ids_that_change_in_place_are_read_again(npu: torch.device) -> None:
    model = made("qwen2_5_vl", FULL).to(npu)
    batch = fresh(batch_of(copy.deepcopy(model).cpu(), "qwen2_5_vl", IMAGES), npu)
    npu_patch.apply(model)
    with torch.no_grad():
        first = model(**batch).logits
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in batch:  # every image token has another place now
                batch[name].copy_(batch[name].roll(-1, 1))
        second = model(**batch).logits
        npu_patch.restore()
        expected = model(**fresh({name: each.cpu() for name, each in batch.items()}, npu)).logits
    assert not torch.allclose(first, second)
    assert torch.allclose(second, expected, rtol=1e-4, atol=1e-4)


def test_a_function_that_fails_on_the_host_is_the_original(npu: torch.device) -> None:
    def needs_the_device(grid_thw: Tensor) -> Tensor:
        return grid_thw + torch.ones(1, dtype=torch.long, device=npu)

    serve = on_host._tables(needs_the_device, npu.type)
    found = serve(torch.tensor([[1, 2, 2]], device=npu))
    assert "on the host it fails" in found.reason


def test_a_function_that_writes_to_its_input_is_the_original(npu: torch.device) -> None:
    def writes(grid_thw: Tensor) -> Tensor:
        grid_thw[:, 0] = 1
        return grid_thw.sum()

    grid = torch.tensor([[4, 2, 2]], device=npu)
    assert on_host._tables(writes, npu.type)(grid).reason == "it writes to what it is given"
    assert grid.tolist() == [[4, 2, 2]]


def test_every_model_with_placeholders_or_positions_is_found() -> None:
    """By their methods, in whichever modeling file."""
    wanted = found = 0
    for file in sorted(Path(models.__path__[0]).glob("*/modeling_*.py")):
        if on_host.PLACEHOLDERS in file.read_text(encoding="utf-8"):
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
            names = {site.label for site in on_host.find(module)}
            own = [
                each for each in vars(module).values() if inspect.isclass(each) and each.__module__ == module.__name__
            ]
            with_placeholders = [each for each in own if on_host.PLACEHOLDERS in vars(each)]
            wanted += len(with_placeholders)
            found += sum(
                f"{each.__module__}.{each.__qualname__}.{on_host.PLACEHOLDERS}" in names for each in with_placeholders
            )
    assert found == wanted > 10


def test_text_alone_reads_nothing(npu: torch.device) -> None:
    model = made("qwen2_5_vl", LANGUAGE).to(npu)
    npu_patch.apply(model)
    ids: Any = torch.arange(3, 15, device=npu)[None]
    model(input_ids=ids)
    with simulator.count() as counted, torch.no_grad():
        model(input_ids=ids.clone())
    assert counted.host_copies == 0


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copy_": lambda tensor, new: tensor.copy_(new),
    "the data's copy_": lambda tensor, new: tensor.data.copy_(new),
    "other data": lambda tensor, new: setattr(tensor, "data", new.clone()),
    "a storage's copy_": lambda tensor, new: tensor.untyped_storage().copy_(new.clone().untyped_storage()),
    "_foreach_copy_": lambda tensor, new: torch._foreach_copy_([tensor], [new]),
}


@pytest.mark.parametrize("write", WRITES)
def test_buffers_that_are_filled_anew_are_read_anew_whatever_versions_say(write: str, npu: torch.device) -> None:
    """As a broadcast, a loader of static buffers or a graph fills them."""
    model = made("qwen2_5_vl", FULL).to(npu)
    batch = fresh(batch_of(copy.deepcopy(model).cpu(), "qwen2_5_vl", IMAGES), npu)
    npu_patch.apply(model)
    with torch.no_grad():
        model(**batch)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            if name in batch:  # every image token has another place now
                WRITES[write](batch[name], batch[name].roll(-1, 1))
        found = model(**batch).logits
        npu_patch.restore()
        expected = model(**fresh({name: each.cpu() for name, each in batch.items()}, npu)).logits
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_prompt_with_images_waits_a_few_times(family: str, npu: torch.device) -> None:
    """generate() works out positions and encodes images before the model's forward."""
    model = made(family, FULL).to(npu)
    batch = fresh(batch_of(copy.deepcopy(model).cpu(), family, IMAGES), npu)
    batch.pop("labels")

    def waits() -> int:
        with simulator.count() as counted:
            model.generate(**{name: each.clone() for name, each in batch.items()}, max_new_tokens=1, do_sample=False)
        return counted.host_copies

    waits()
    unpatched = waits()
    npu_patch.apply(model)
    waits()
    assert waits() <= 8 < 30 < unpatched


@pytest.mark.usefixtures("simulated")
def test_seconds_of_a_videos_frames_are_read_with_the_grids(npu: torch.device) -> None:
    grid, seconds = torch.tensor([[2, 4, 4]], device=npu), torch.tensor([0.5], device=npu)
    with simulator.count() as counted:
        found = on_host._there(lambda grids, each: grids[0, 0] * each[0], npu.type, (grid, seconds), {}, lambda x, _: x)
    assert found.item() == 1.0 and counted.host_copies == 1


@pytest.mark.parametrize("part", ["blocks", "attn"])
def test_compiled_parts_of_a_tower_are_given_plain_tensors(part: str, npu: torch.device) -> None:
    model = made("qwen2_5_vl", FULL).to(npu)
    batch = fresh(batch_of(copy.deepcopy(model).cpu(), "qwen2_5_vl", IMAGES), npu)
    step(model, batch)
    expected = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    npu_patch.apply(model)
    for block in model.model.visual.blocks:
        (block if part == "blocks" else block.attn).compile(backend="aot_eager")
    step(model, batch)
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    torch._dynamo.reset()
    assert found.keys() == expected.keys()
    scale = {name: each.abs().max() for name, each in expected.items()}
    assert [name for name in found if (found[name] - expected[name]).abs().max() > 1e-4 * scale[name] + 1e-7] == []
