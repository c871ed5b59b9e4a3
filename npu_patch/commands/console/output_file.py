"""A file that a command is to write: refused before anything is measured, if it cannot be written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from npu_patch.commands.console.result import CommandError


def output_file(option: str, path: Path, ending: str = "") -> Path:
    """Raises `CommandError` that names the option, the path and what is accepted. Leaves no file behind."""
    reason = why_unwritable(path)
    if reason is not None:
        raise CommandError(f"{option} {path}: {reason}")
    if not path.name.endswith(ending):
        raise CommandError(f"{option} {path}: accepted is a name that ends in {ending}")
    return path


def why_unwritable(path: Path) -> str | None:
    """Found out by opening it: permissions do not say everything (root, /proc, full and read-only disks)."""
    folder = path.absolute().parent
    if path.is_dir():
        return "that is a folder; a file is wanted"
    if not folder.is_dir():
        return f"there is no folder {folder}"
    try:
        if path.is_file():
            path.open("ab").close()
        elif path.exists():  # a device or a pipe: opening it may wait for a reader
            return None if os.access(path, os.W_OK) else "it cannot be written"
        else:
            path.open("xb").close()
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    except OSError as error:
        return f"it cannot be written ({error.strerror or error})"
    return None


def why_no_file_can_be_made(path: Path) -> str | None:
    """As `why_unwritable`, for a file whose folders are made with it."""
    if path.absolute().parent.is_dir():
        return why_unwritable(path)
    existing = next(each for each in path.absolute().parents if each.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        return f"no folder can be made in {existing} ({error.strerror or error})"
    return None
