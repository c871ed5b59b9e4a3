"""python -m npu_patch count: what is counted, for which layer, and that no time is claimed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from npu_patch import simulator
from npu_patch.commands import main
from npu_patch.commands.count.costs import MEASURES, Costs
from npu_patch.commands.count.layers import Layers
from npu_patch.commands.count.level_two import LevelTwo
from npu_patch.simulator.errors import SimulatorError
from tests.support.needs_triton import needs_triton

pytestmark = pytest.mark.usefixtures("simulated", "leaving_nothing_applied")

STEPS, WAYS = {"training step", "decoded token"}, ("unpatched", "patched")


def counted(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = main(["count", *arguments, "--json"])
    content = json.loads(capsys.readouterr().out)
    assert code == 0, content
    return content["steps"]


@pytest.mark.parametrize("arguments", [["qwen3"], ["qwen3", "--lora"], ["qwen3_moe"], ["qwen3_5"]], ids=" ".join)
def test_operators_and_layers_each_add_up_to_the_step_and_patched_is_less(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    steps = counted(capsys, *arguments, "--tokens", "12")
    assert set(steps) == STEPS
    for step in steps.values():
        for way in WAYS:
            for parts in ("by_op", "by_layer"):
                for measure in MEASURES:
                    assert sum(each[measure] for each in step[way][parts].values()) == step[way]["total"][measure]
        assert step["patched"]["total"]["launches"] < step["unpatched"]["total"]["launches"]


@pytest.mark.parametrize("way", WAYS)
def test_the_cost_of_a_layer_is_what_a_model_has_less_without_it(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Forward and backward: a kernel of the backward is for the layer whose forward made its node."""
    two, three = (counted(capsys, "llama", "--size", f"num_hidden_layers={n}")["training step"][way] for n in (2, 3))
    for measure in ("launches", "copies", "float32_products", "bytes"):
        less = three["total"][measure] - two["total"][measure]
        assert three["by_layer"]["model.layers.1"][measure] == less, measure


def test_products_of_float32_are_told_from_others(capsys: pytest.CaptureFixture[str]) -> None:
    small, wide = (counted(capsys, "llama", "--dtype", dtype)["training step"] for dtype in ("bfloat16", "float32"))
    adapters = counted(capsys, "llama", "--lora")["training step"]
    for way in WAYS:
        products = [each[way]["total"]["float32_products"] for each in (small, adapters, wide)]
        assert products[0] < products[1] and products[0] < products[2]


@pytest.mark.parametrize("width", [2**19, 2**21])
def test_a_result_that_is_read_at_once_is_in_the_cache_if_it_fits(width: int, npu: torch.device) -> None:
    """An emulated kernel's result is made elsewhere and then copied to the device: that is one allocation."""
    model = torch.nn.Linear(1, 1)
    costs = Costs(Layers(model), LevelTwo(size=width * 4 * 12))
    x = torch.randn(2, width // 2, device=npu)
    with simulator.count(costs):
        for _ in range(4):
            x = torch.ops.npu.npu_swiglu(torch.cat((x, x), -1), dim=-1) + 1.0
    assert costs.total.launches == 12
    assert costs.total.bytes_beyond_l2 == x.numel() * x.element_size()  # the first x


def test_no_time_is_shown_and_each_bar_is_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "counts.svg"
    assert main(["count", "llama", "--tokens", "8", "--svg", str(picture), "--rows", "3"]) == 0
    text = capsys.readouterr().out
    words = set(text.split())
    assert "not times" in text and "model.layers.0" in words and not words & {"ms", "s", "us", "seconds"}
    tree = ElementTree.parse(picture)
    bars = tree.findall(".//{http://www.w3.org/2000/svg}rect")
    assert len(bars) == len(STEPS) * len(MEASURES) * len(WAYS)
    assert max(float(bar.get("width", 0)) for bar in bars) > min(float(bar.get("width", 0)) for bar in bars)


def test_a_switch_and_an_implementation_are_those_of_the_patched_side(capsys: pytest.CaptureFixture[str]) -> None:
    every, without = (counted(capsys, "qwen3", "--tokens", "8", *more) for more in ((), ("--switch", "rms_norm=off")))
    assert "npu::npu_rms_norm" in every["training step"]["patched"]["by_op"]
    assert "npu::npu_rms_norm" not in without["training step"]["patched"]["by_op"]
    launches = [each["training step"]["unpatched"]["total"]["launches"] for each in (every, without)]
    assert launches[0] == launches[1]
    loop, grouped = (
        counted(capsys, "qwen3_moe", "--tokens", "8", "--experts", name) for name in ("eager", "grouped_mm")
    )
    waits = [each["training step"]["unpatched"]["total"]["host_waits"] for each in (loop, grouped)]
    assert waits[0] > waits[1]


@pytest.mark.parametrize("option", ["--packed", "--padding"])
def test_packed_and_padded_batches_are_counted_as_such(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers writes their mask out, of all scores."""
    whole, other = (counted(capsys, "llama", "--size", "num_hidden_layers=1", *more) for more in ((), (option, "4")))
    bytes_of_masks = [
        each["training step"]["unpatched"]["by_layer"]["outside the layers"]["bytes"] for each in (whole, other)
    ]
    assert bytes_of_masks[1] > bytes_of_masks[0] + 64 * 64


def test_a_configuration_is_enough_of_a_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from npu_patch.commands.subject.tiny_model import tiny_config

    tiny_config("llama").save_pretrained(tmp_path)
    assert set(counted(capsys, str(tmp_path), "--tokens", "8")) == STEPS


@needs_triton
@pytest.mark.usefixtures("two_cores")
def test_triton_kernels_are_counted_where_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for option, there in (("--triton", True), ("--no-triton", False)):
        ops = counted(capsys, "qwen3", "--tokens", "4", option)["training step"]["patched"]["by_op"]
        assert any(name.startswith("triton::") for name in ops) is there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens 0: accepted are numbers from 1"),
        (["--tokens", "4", "--packed", "5"], "--packed 5: accepted are numbers from 1 to 4"),
        (["--tokens", "4", "--padding", "4"], "--padding 4: accepted are numbers from 0 to 3"),
        (["--switch", "loss"], "--switch loss: accepted is NAME=VALUE"),
        (["--switch", "losses=0"], "--switch losses=0: accepted names are patch, fused_ops"),
        (["--switch", "loss=maybe"], "--switch loss=maybe: accepted are 1/true/on/yes"),
        (["--size", "width=3"], "--size width=3: LlamaConfig has no width"),
        (["--size", "hidden_size=wide"], "--size hidden_size=wide: accepted is JSON"),
        (["--svg", "counts.png"], "--svg counts.png: accepted is a name that ends in .svg"),
        (["--attention", "fast"], "--attention fast: "),
    ],
    ids=" ".join,
)
def test_bad_usage_is_told_what_is_accepted(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["count", "llama", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_real_npu_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise SimulatorError("a real NPU is present")

    monkeypatch.setattr(simulator, "start", refuse)
    assert main(["count", "llama"]) == 2
    assert "count counts on the simulated NPU alone: a real NPU is present" in capsys.readouterr().err
