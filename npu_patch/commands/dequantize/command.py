"""dequantize: a plain copy of a model with int8 weights, to merge adapters into or to compare with. Needs no device."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npu_patch.checkpoints.folder import checkpoint_in
from npu_patch.checkpoints.w8a8 import w8a8_in
from npu_patch.commands.console.result import CommandError, Result
from npu_patch.commands.dequantize.dequantising import Dequantising
from npu_patch.commands.quantize.copying import copied, in_one_line, require_apart, size_of
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
    content = {
        "output": str(output),
        "format": found.described_by,
        "dequantised": len(found.weights),
        "bytes_before": sum(shard.source.size for shard in plan.shards),
        "bytes": sum(shard.target.size for shard in plan.shards),
        "shards": len(plan.shards),
        "kept": list(outcome.kept),
        "damaged": list(outcome.damaged),
    }
    return Result(content, lambda: _shown(content), fine=True)


def _shown(content: dict[str, Any]) -> Iterator[str]:
    yield f"{content['output']}: {content['dequantised']} weights that were int8 ({content['format']})"
    yield f"{size_of(content['bytes_before'])} became {size_of(content['bytes'])}, in {content['shards']} files"
    if content["kept"]:
        yield f"{len(content['kept'])} were there already, and are as they were written"
    if content["damaged"]:
        yield f"written anew, as they had changed: {', '.join(content['damaged'])}"
