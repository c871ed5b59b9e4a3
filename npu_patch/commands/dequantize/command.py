"""dequantize: a plain copy of a model with int8 weights, to merge adapters into or to compare with. Needs no device."""

from __future__ import annotations

import argparse
from pathlib import Path

from npu_patch.checkpoints.folder import checkpoint_in
from npu_patch.checkpoints.w8a8 import w8a8_in
from npu_patch.commands.console.result import CommandError, Result
from npu_patch.commands.dequantize.dequantising import Dequantising
from npu_patch.commands.quantize.copying import content_of, copied, in_one_line, require_apart, shown
from npu_patch.commands.quantize.plan import plan_for
from npu_patch.commands.subject.stored_folder import folder_of


def run(options: argparse.Namespace) -> Result:
    output = Path(options.out)
    with in_one_line(output):
        folder = folder_of(options.model)
        require_apart(folder, output)
        checkpoint = checkpoint_in(folder)
        found = w8a8_in(checkpoint)
        if found is None or not found.weights:
            raise CommandError(f"MODEL {folder}: none of its {len(checkpoint.tensors)} tensors is a quantised weight")
        plan = plan_for(checkpoint, Dequantising(checkpoint, found))
        outcome = copied(plan, output, options.model, "dequantising", options.json)
        checkpoint_in(output)
    content = content_of(plan, output, outcome, format=found.described_by, dequantised=len(found.weights))
    what = f"{content['dequantised']} weights that were int8"
    return Result(content, lambda: shown(content, what), fine=True)
