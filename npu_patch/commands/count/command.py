"""count: what a training step and a decoded token cost, by what decides on Ascend; on the simulated NPU.

A spyglass, not a prediction: counts are properties of the program, and no time is shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from npu_patch import simulator
from npu_patch.commands.console.output_file import output_file
from npu_patch.commands.console.result import CommandError, Result, named
from npu_patch.commands.console.terminal import steps, table
from npu_patch.simulator.errors import SimulatorError
from npu_patch.switches import PREFIX, SWITCHES, resolve

if TYPE_CHECKING:
    import torch

NOTE = "counted on the simulated NPU: properties of the program, not times. The optimizer's step is no part of it."
UNPATCHED, PATCHED = "unpatched", "patched"
GIVEN = ("model", "tokens", "images", "packed", "padding", "dtype", "lora")
IMAGE_SIZES = ((56, 72), (40, 88), (72, 48))  # height and width


def run(options: argparse.Namespace) -> Result:
    if options.svg is not None:
        output_file("--svg", options.svg, ending=".svg")
    for name, least, most in (("tokens", 1, None), ("packed", 1, options.tokens), ("padding", 0, options.tokens - 1)):
        value = getattr(options, name)
        if value < least or (most is not None and value > most):
            up_to = "" if most is None else f" to {most}"
            raise CommandError(f"--{name} {value}: accepted are numbers from {least}{up_to}")
    if options.images < 0:
        raise CommandError(f"--images {options.images}: accepted are numbers from 0")
    if options.images and (options.real or options.size or options.packed > 1 or options.padding):
        raise CommandError("--images: accepted are no --real, --size, --packed and --padding beside it")
    ways = {UNPATCHED: {"patch": False}, PATCHED: _switches(options)}
    try:
        simulator.start()
    except SimulatorError as error:
        raise CommandError(f"count counts on the simulated NPU alone: {error}") from error
    content: dict[str, Any] = {
        **{name: getattr(options, name) for name in GIVEN},
        "note": NOTE,
        "ways": ways,
        "steps": {},
    }
    with steps("counting", options.json) as progress:
        progress.of(len(ways))
        for way, switches in ways.items():
            for step, found in _counted(options, switches).items():
                content["steps"].setdefault(step, {})[way] = found
            progress.done()
    if options.svg is not None:
        from npu_patch.commands.count.picture import drawn

        options.svg.write_text(drawn(content))
        content["picture"] = str(options.svg)
    return Result(content, lambda: _shown(content, options.rows), fine=True)


def _switches(options: argparse.Namespace) -> dict[str, Any]:
    given: dict[str, Any] = {} if options.triton is None else {"triton": options.triton}
    variables = {switch.name: PREFIX + switch.variable for switch in SWITCHES if switch.kind != "path"}
    for name, value in (_pair("--switch", each) for each in options.switch):
        if name not in variables:
            raise CommandError(f"--switch {name}={value}: accepted names are {', '.join(variables)}")
        try:
            given[name] = resolve({}, {variables[name]: value})[name]
        except ValueError as error:
            raise CommandError(f"--switch {name}={value}: {str(error).partition(': ')[2]}") from error
    return given


def _pair(option: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise CommandError(f"{option} {text}: accepted is NAME=VALUE")
    return name, value


def _counted(options: argparse.Namespace, switches: dict[str, Any]) -> dict[str, Any]:
    from npu_patch.commands.count.model_steps import counted_steps, laid_out
    from npu_patch.commands.subject import models

    model, batch = _with_images(options) if options.images else _of_text(options)
    model = model.to(models.DTYPES[options.dtype])
    for what, setter in (("attention", "set_attn_implementation"), ("experts", "set_experts_implementation")):
        wanted = getattr(options, what)
        if wanted is not None:
            try:
                getattr(model, setter)(wanted)
            except Exception as error:
                raise CommandError(f"--{what} {wanted}: {named(error)}") from error
    if options.lora:
        model = _adapted(model)
    model = model.to("npu")
    models.require_it_runs(model, batch, options.model)
    batch = {name: tensor.to("npu") for name, tensor in laid_out(batch, options.packed, options.padding).items()}
    return {
        step: {
            "total": {**asdict(found.costs.total), "peak_bytes": found.peak_bytes},
            "by_op": {name: asdict(cost) for name, cost in found.costs.of_ops.items()},
            "by_layer": {name: asdict(cost) for name, cost in found.costs.of_layers.items()},
        }
        for step, found in counted_steps(model, batch, switches).items()
    }


def _of_text(options: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from npu_patch.commands.subject import models

    sizes = dict(_pair("--size", each) for each in options.size)
    model = models.sized_source_of(options.model, sizes, options.real).make(0, False)
    return model, models.batch_for(model, batch=1, length=options.tokens)


def _with_images(options: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    from npu_patch.commands.subject.vision.batches import padded
    from npu_patch.commands.subject.vision.drawing import several
    from npu_patch.commands.subject.vision.models import tiny_vision_model, vision_family

    model = tiny_vision_model(options.model)
    sizes = [IMAGE_SIZES[at % len(IMAGE_SIZES)] for at in range(options.images)]
    return model, padded(model, vision_family(options.model), [several(*sizes)])


def _adapted(model: torch.nn.Module) -> torch.nn.Module:
    """In float32, on all linear layers but the head: "all-linear" means experts too."""
    import torch

    from npu_patch.commands.subject.lora_step import with_adapters

    linear = [name for name, each in model.named_modules() if type(each) is torch.nn.Linear]
    targets = [name for name in linear if name.rpartition(".")[2] != "lm_head"]
    adapted = with_adapters(model, r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _shown(content: dict[str, Any], rows: int) -> Iterator[Any]:
    from npu_patch.commands.count.costs import MEASURES

    ways = list(content["ways"])
    lora = ", LoRA" if content["lora"] else ""
    given = f"{content['images']} images" if content["images"] else f"{content['tokens']} tokens"
    yield f"{content['model']}, {given}, {content['dtype']}{lora}: {' to '.join(ways)}"
    yield content["note"]
    titles = {**MEASURES, "peak_bytes": "peak MB"}
    for step, found in content["steps"].items():
        totals = [found[way]["total"] for way in ways]
        shown = [(titles[name], *(_cell(name, [each[name]]) for each in totals)) for name in titles]
        yield table(f"{step[0].upper()}{step[1:]}", ("", *ways), shown, numbers=ways)
        for what, kept in (("by_layer", None), ("by_op", rows)):
            yield _detail(what.replace("_", " "), [found[way][what] for way in ways], MEASURES, kept)
    if "picture" in content:
        yield f"drawn to {content['picture']}"


def _detail(what: str, costs: list[dict[str, Any]], titles: dict[str, str], kept: int | None) -> Any:
    """A row for each layer or operator; those with the most launches, where only some are kept."""
    names = list(dict.fromkeys(name for each in costs for name in each))
    if kept is not None:
        names = sorted(names, key=lambda name: -max(each[name]["launches"] for each in costs if name in each))[:kept]
    cells = [
        (name, *(_cell(measure, [each.get(name, {}).get(measure, 0) for each in costs]) for measure in titles))
        for name in names
    ]
    return table(what, ("", *titles.values()), cells, numbers=tuple(titles.values()))


def _cell(measure: str, values: list[int]) -> str:
    texts = [f"{value / 1e6:.2f}" if "bytes" in measure else str(value) for value in values]
    return "" if not any(values) else " to ".join(texts)
