"""A model's folder, named on the command line by its path or as the hub's cache knows it."""

from __future__ import annotations

import re
from pathlib import Path

from npu_patch.commands.console.result import CommandError


def folder_of(model: str, argument: str = "MODEL") -> Path:
    """Raises `CommandError` where there is none; nothing is downloaded."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not folder.exists():
        try:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(model, local_files_only=True))
        except Exception as error:
            raise CommandError(
                f"{argument} {model}: there is no such folder, and the hub's cache has no such model "
                f"({type(error).__name__})"
            ) from error
    found = "that is a file" if folder.exists() else "there is no such folder"
    raise CommandError(f"{argument} {model}: {found}; a model's folder is accepted")
