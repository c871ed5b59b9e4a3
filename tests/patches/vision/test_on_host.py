"""What models for images ask about grids and token ids: right, and with one copy to the host per step."""

from __future__ import annotations

import copy
import importlib
import inspect
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

    serve = on_host._on_host(needs_the_device, npu.type)
    found = serve(torch.tensor([[1, 2, 2]], device=npu))
    assert "on the host it fails" in found.reason


def test_a_function_that_writes_to_its_input_is_the_original(npu: torch.device) -> None:
    def writes(grid_thw: Tensor) -> Tensor:
        grid_thw[:, 0] = 1
        return grid_thw.sum()

    grid = torch.tensor([[4, 2, 2]], device=npu)
    assert on_host._on_host(writes, npu.type)(grid).reason == "it writes to what it is given"
    assert on_host.HOST_READS.on_host(grid).tolist() == [[4, 2, 2]]


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
