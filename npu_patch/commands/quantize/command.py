"""quantize: a copy of a model with int8 weights, for int8 products (W8A8). Needs no device and little memory."""

from __future__ import annotations

import argparse
import errno
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npu_patch.checkpoints.folder import Checkpoint, checkpoint_in, json_of
from npu_patch.checkpoints.safetensors_file import BadCheckpoint
from npu_patch.checkpoints.w8a8 import ASCEND, DESCRIPTION, quantization_config_of, w8a8_in
from npu_patch.commands.console.result import CommandError, Result
from npu_patch.commands.console.terminal import steps, table
from npu_patch.commands.quantize.plan import Plan, int8_names, plan_for
from npu_patch.commands.quantize.progress import FOLDER, Progress
from npu_patch.commands.quantize.selection import select
from npu_patch.commands.quantize.shard import sha256_of
from npu_patch.commands.quantize.writing import MANIFEST, Outcome, write
from npu_patch.commands.subject.stored_folder import folder_of

MEGABYTE = 2**20
SLACK = 16 * MEGABYTE  # for what is of JSON


def run(options: argparse.Namespace) -> Result:
    output = Path(options.out)
    try:
        plan = _plan(folder_of(options.model), output, options)
        if (output / MANIFEST).is_file() and not (output / FOLDER).exists():
            _require_whole(output, plan)
            return _result(plan, output, Outcome(tuple(shard.name for shard in plan.shards), ()))
        _require_room(plan, output)
        progress = Progress(output)
        with progress.begun(plan.fingerprint(), options.model), steps("quantising (MiB)", options.json) as bar:
            bar.of(sum(shard.source.size - shard.source.start for shard in plan.shards) / MEGABYTE)
            outcome = write(plan, progress, lambda size: bar.done(size / MEGABYTE))
        w8a8_in(checkpoint_in(output))
    except BadCheckpoint as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(_why(error, output)) from error
    return _result(plan, output, outcome)


def _plan(folder: Path, output: Path, options: argparse.Namespace) -> Plan:
    if output.resolve() == folder.resolve() or folder.resolve() in output.resolve().parents:
        raise CommandError(f"OUT {output}: that is within MODEL, which stays as it is; another folder is accepted")
    for option, patterns in (("--ignore", options.ignore), ("--also", options.also)):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise CommandError(f"{option} {pattern}: that is no regular expression ({error})") from error
    checkpoint = checkpoint_in(folder)
    _require_unquantised(checkpoint)
    selection = select(checkpoint.tensors, checkpoint.config, options.ignore, options.also, options.keep_packed)
    if not selection.selected:
        raise CommandError(f"MODEL {folder}: none of its {len(checkpoint.tensors)} tensors would be quantised")
    return plan_for(checkpoint, selection, options.format, options.ignore, options.also)


def _require_unquantised(checkpoint: Checkpoint) -> None:
    found = quantization_config_of(checkpoint.config)
    if found is not None:
        raise CommandError(f"MODEL {checkpoint.folder} is quantised already: {found.get('quant_method') or found}")
    if (checkpoint.folder / DESCRIPTION).is_file():
        raise CommandError(f"MODEL {checkpoint.folder} is quantised already: it has {DESCRIPTION}")


def _require_room(plan: Plan, output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise CommandError(f"OUT {output}: that is a file; a folder is wanted")
    existing = next(each for each in (output.absolute(), *output.absolute().parents) if each.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()  # nameless: whenever this ends, nothing is left of it
    except OSError as error:
        raise CommandError(f"OUT {output}: nothing can be made in {existing} ({error.strerror or error})") from error
    inside = [path.name for path in output.iterdir()] if output.is_dir() else []
    if inside and FOLDER not in inside:
        raise CommandError(
            f"OUT {output}: there are other files ({sorted(inside)[0]}); an empty or new folder is wanted"
        )
    there = [output / FOLDER / "part", *(output / name for name in inside)]
    written = sum(path.stat().st_size for path in there if path.is_file())
    needed, free = plan.size() + SLACK - written, shutil.disk_usage(existing).free
    if needed > free:
        raise CommandError(f"OUT {output}: {_size(needed)} are needed, {_size(free)} are free")


def _require_whole(output: Path, plan: Plan) -> None:
    """Raises `CommandError` where what is there is another quantisation, or is damaged."""
    manifest = json_of(output / MANIFEST)
    if manifest.get("settings") != dict(plan.settings):
        there = manifest.get("settings")
        raise CommandError(f"OUT {output}: a quantisation with other settings is there ({there}); name another folder")
    source = plan.checkpoint.folder
    for folder, key in ((output, "files"), (source, "source")):
        for name, expected in manifest.get(key, {}).items():
            if not (folder / name).is_file() or sha256_of(folder / name) != expected:
                raise CommandError(f"OUT {output}: {folder / name} is not what {MANIFEST} says")


def _why(error: OSError, output: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"OUT {output}: the disk is full; make room and start the same command again, which goes on from here"
    return f"{error.filename or output}: {error.strerror or error}; what is finished stays, and another call goes on"


def _result(plan: Plan, output: Path, outcome: Outcome) -> Result:
    left = Counter(plan.selection.left.values())
    content = {
        "output": str(output),
        "format": plan.kind,
        "quantised": len(int8_names(plan)),
        "left": dict(left.most_common()),
        "bytes_before": sum(shard.source.size for shard in plan.shards),
        "bytes": sum(shard.target.size for shard in plan.shards),
        "shards": len(plan.shards),
        "kept": list(outcome.kept),
        "damaged": list(outcome.damaged),
    }
    return Result(content, lambda: _shown(content), fine=True)


def _shown(content: dict[str, Any]) -> Iterator[Any]:
    yield f"{content['output']}: {content['quantised']} weights in int8 ({content['format']})"
    yield f"{_size(content['bytes_before'])} became {_size(content['bytes'])}, in {content['shards']} files"
    if content["kept"]:
        yield f"{len(content['kept'])} were there already, and are as they were written"
    if content["damaged"]:
        yield f"written anew, as they had changed: {', '.join(content['damaged'])}"
    yield ""
    yield table("Tensors left as they are", ("why", "tensors"), list(content["left"].items()), numbers=("tensors",))
    if content["format"] == ASCEND:
        yield f"{DESCRIPTION} says which are which; config.json does not."


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
