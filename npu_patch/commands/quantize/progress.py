"""What an interrupted run leaves in the output folder, by which the next one goes on.

`.quantize/plan.json` says what is being written, `.quantize/done/` what of it is, with its hashes; a shard is written
in `.quantize/part`, noted as done and only then moved to its place. It is gone when everything is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from npu_patch.commands.console.result import CommandError
from npu_patch.commands.quantize.shard import Written
from npu_patch.measuring.atomic_file import write_atomically

FOLDER = ".quantize"


class Progress:
    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / FOLDER
        self.part = self.folder / "part"

    @contextlib.contextmanager
    def begun(self, plan: dict[str, Any], described: str) -> Iterator[None]:
        """Raises `CommandError` where another plan was begun there, or another process is at it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "done").mkdir(exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CommandError(f"OUT {self.output}: another process is writing there") from None
            except OSError:  # a file system that has no locks
                pass
            self._check(plan, described)
            yield

    def _check(self, plan: dict[str, Any], described: str) -> None:
        file = self.folder / "plan.json"
        before = _content(file)
        if before is None:
            write_atomically(file, json.dumps(plan, indent=1))
        elif before != plan:
            differ = ", ".join(sorted(name for name in {*before, *plan} if before.get(name) != plan.get(name)))
            raise CommandError(
                f"OUT {self.output}: an interrupted copy of something else is there ({differ} differ from "
                f"{described}): remove the folder, or name another"
            )

    def done(self, name: str) -> Written | None:
        """Where it says so, and a file is there."""
        content = _content(self.folder / "done" / f"{name}.json")
        return Written(**content) if content and (self.output / name).is_file() else None

    def finish(self, name: str, written: Written) -> None:
        write_atomically(self.folder / "done" / f"{name}.json", json.dumps(asdict(written)))
        self.put(name)

    def put(self, name: str) -> None:
        """Moves what was written in `part` to its place, once it is on the disk."""
        _on_disk(self.part)
        os.replace(self.part, self.output / name)
        _on_disk(self.output)

    def end(self) -> None:
        shutil.rmtree(self.folder)


def _content(file: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(file.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else None
    return None


def _on_disk(path: Path) -> None:
    with contextlib.suppress(OSError):  # a file system that has no such thing
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
