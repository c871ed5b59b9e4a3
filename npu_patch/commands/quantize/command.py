"""quantize: a copy of a model with int8 weights, for int8 products (W8A8). Needs no device and little memory."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npu_patch.checkpoints.folder import Checkpoint, checkpoint_in
from npu_patch.checkpoints.w8a8 import ASCEND, DESCRIPTION, quantization_config_of, w8a8_in
from npu_patch.commands.console.result import CommandError, Result
from npu_patch.commands.console.terminal import table
from npu_patch.commands.quantize.copying import content_of, copied, in_one_line, require_apart, shown
from npu_patch.commands.quantize.plan import Plan, int8_names, plan_for
from npu_patch.commands.quantize.quantising import Quantising
from npu_patch.commands.quantize.selection import WEIGHT, select
from npu_patch.commands.quantize.writing import Outcome
from npu_patch.commands.subject.stored_folder import folder_of


def run(options: argparse.Namespace) -> Result:
    output = Path(options.out)
    with in_one_line(output):
        folder = folder_of(options.model)
        require_apart(folder, output)
        checkpoint = checkpoint_in(folder)
        change = _change(checkpoint, options)
        plan = plan_for(checkpoint, change)
        outcome = copied(plan, output, options.model, "quantising", options.json)
        w8a8_in(checkpoint_in(output))
    return _result(plan, change, output, outcome)


def _change(checkpoint: Checkpoint, options: argparse.Namespace) -> Quantising:
    for option, patterns in (("--ignore", options.ignore), ("--also", options.also)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise CommandError(f"{option} {pattern}: that is no regular expression ({error})") from error
            if not any(re.match(pattern, name.removesuffix(WEIGHT)) for name in checkpoint.tensors):
                like = f"tensors are like {next(iter(checkpoint.tensors))}, and '.*' is any beginning"
                raise CommandError(f"{option} {pattern}: no module's name begins so; {like}")
    _require_unquantised(checkpoint)
    selection = select(checkpoint.tensors, checkpoint.config, options.ignore, options.also, options.keep_packed)
    if not selection.selected:
        raise CommandError(
            f"MODEL {checkpoint.folder}: none of its {len(checkpoint.tensors)} tensors would be quantised"
        )
    return Quantising(selection, options.format, options.ignore, options.also)


def _require_unquantised(checkpoint: Checkpoint) -> None:
    found = quantization_config_of(checkpoint.config)
    if found is not None:
        raise CommandError(f"MODEL {checkpoint.folder} is quantised already: {found.get('quant_method') or found}")
    if (checkpoint.folder / DESCRIPTION).is_file():
        raise CommandError(f"MODEL {checkpoint.folder} is quantised already: it has {DESCRIPTION}")


def _result(plan: Plan, change: Quantising, output: Path, outcome: Outcome) -> Result:
    left = Counter(change.selection.left.values())
    own = {"format": change.kind, "quantised": len(int8_names(plan)), "left": dict(left.most_common())}
    content = content_of(plan, output, outcome, **own)
    return Result(content, lambda: _shown(content), fine=True)


def _shown(content: dict[str, Any]) -> Iterator[Any]:
    yield from shown(content, f"{content['quantised']} weights in int8")
    yield ""
    yield table("Tensors left as they are", ("why", "tensors"), list(content["left"].items()), numbers=("tensors",))
    if content["format"] == ASCEND:
        yield f"{DESCRIPTION} says which are which; config.json does not."
