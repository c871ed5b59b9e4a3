"""From a plan to a finished folder, however often it is interrupted; or to one line that says why not."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from npu_patch.checkpoints.folder import json_of
from npu_patch.checkpoints.safetensors_file import BadCheckpoint
from npu_patch.commands.console.result import CommandError
from npu_patch.commands.console.terminal import steps
from npu_patch.commands.quantize.plan import Plan
from npu_patch.commands.quantize.progress import FOLDER, Progress
from npu_patch.commands.quantize.shard import sha256_of
from npu_patch.commands.quantize.writing import Outcome, write

MEGABYTE = 2**20
SLACK = 16 * MEGABYTE  # for what is of JSON


def require_apart(folder: Path, output: Path) -> None:
    if output.resolve() == folder.resolve() or folder.resolve() in output.resolve().parents:
        raise CommandError(f"OUT {output}: that is within MODEL, which stays as it is; another folder is accepted")


@contextlib.contextmanager
def in_one_line(output: Path) -> Iterator[None]:
    """What is wrong with a checkpoint or a disk, as a `CommandError`."""
    try:
        yield
    except BadCheckpoint as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(_why(error, output)) from error


def copied(plan: Plan, output: Path, model: str, doing: str, quiet: bool) -> Outcome:
    """Goes on with what was interrupted; what is finished is checked. `doing`: for the progress bar."""
    if (output / plan.change.manifest).is_file() and not (output / FOLDER).exists():
        _require_whole(output, plan)
        return Outcome(tuple(shard.name for shard in plan.shards), ())
    _require_room(plan, output)
    progress = Progress(output)
    with progress.begun(plan.fingerprint(), model), steps(f"{doing} (MiB)", quiet) as bar:
        bar.of(sum(shard.source.size - shard.source.start for shard in plan.shards) / MEGABYTE)
        return write(plan, progress, lambda size: bar.done(size / MEGABYTE))


def content_of(plan: Plan, output: Path, outcome: Outcome, **own: Any) -> dict[str, Any]:
    return {
        "output": str(output),
        **own,
        "bytes_before": sum(shard.source.size for shard in plan.shards),
        "bytes": sum(shard.target.size for shard in plan.shards),
        "shards": len(plan.shards),
        "kept": list(outcome.kept),
        "damaged": list(outcome.damaged),
    }


def shown(content: Mapping[str, Any], what: str) -> Iterator[str]:
    """`what`: was done to which weights."""
    yield f"{content['output']}: {what} ({content['format']})"
    yield f"{size_of(content['bytes_before'])} became {size_of(content['bytes'])}, in {content['shards']} files"
    if content["kept"]:
        yield f"{len(content['kept'])} were there already, and are as they were written"
    if content["damaged"]:
        yield f"written anew, as they had changed: {', '.join(content['damaged'])}"


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
        raise CommandError(f"OUT {output}: {size_of(needed)} are needed, {size_of(free)} are free")


def _require_whole(output: Path, plan: Plan) -> None:
    """Raises `CommandError` where what is there is another quantisation, or is damaged."""
    manifest = json_of(output / plan.change.manifest)
    if manifest.get("settings") != dict(plan.change.settings):
        there = manifest.get("settings")
        raise CommandError(f"OUT {output}: another copy, with other settings, is there ({there}); name another folder")
    source = plan.checkpoint.folder
    for folder, key in ((output, "files"), (source, "source")):
        for name, expected in manifest.get(key, {}).items():
            if not (folder / name).is_file() or sha256_of(folder / name) != expected:
                raise CommandError(f"OUT {output}: {folder / name} is not what {plan.change.manifest} says")


def _why(error: OSError, output: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"OUT {output}: the disk is full; make room and start the same command again, which goes on from here"
    return f"{error.filename or output}: {error.strerror or error}; what is finished stays, and another call goes on"


def size_of(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
