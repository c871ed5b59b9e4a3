"""The weights of a head as they are published, beside those of the model: `mtp.fc`, `mtp.pre_fc_norm_embedding`,
`mtp.pre_fc_norm_hidden`, `mtp.norm` and one decoder layer, `mtp.layers.0`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_patch.checkpoints.safetensors_file import FLOATS, header_of

PREFIX = "mtp."
OF_LAYER = re.compile(r"^mtp\.layers\.(\d+)\.")
OF_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.")


@dataclass(frozen=True)
class Published:
    """`shapes`: of the head's tensors. `stamp`: changes where a file with some of them does."""

    path: str
    shapes: Mapping[str, tuple[int, ...]]
    stamp: tuple[Any, ...]

    @property
    def has_experts(self) -> bool:
        return any(".mlp.experts." in name for name in self.shapes)

    @property
    def has_single_experts(self) -> bool:
        return any(OF_EXPERT.search(name) for name in self.shapes)


def published_beside(path: str) -> Published:
    """Reads headers only.

    Raises:
        ValueError: if there are no such weights, or those of a head that is not known.
        OSError: if there is no checkpoint.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    stamp: list[Any] = []
    for file in _files(path):
        entries = [each for each in header_of(file).entries if each.name.startswith(PREFIX)]
        if entries:
            status = os.stat(file)
            stamp.append((str(file), status.st_mtime_ns, status.st_size))
        for each in entries:
            if each.dtype not in FLOATS:
                raise ValueError(f"{each.name} in {file} is {each.dtype}: of a head, {', '.join(FLOATS)} are known")
            shapes[each.name] = each.shape
    if not shapes:
        raise ValueError(
            f"use_mtp=True: {path} has no weights of a head (mtp.*). scripts/train_mtp.py trains one; prompt lookup "
            "and an assistant model need none"
        )
    layers = {int(found[1]) for name in shapes if (found := OF_LAYER.match(name))}
    if layers != {0}:
        raise ValueError(f"{path} has mtp.layers of the numbers {sorted(layers)}: a head of one layer, 0, is known")
    return Published(path, shapes, tuple(stamp))


def _files(path: str) -> list[Path]:
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    if not path:
        raise ValueError("use_mtp=True: the model was not loaded from a checkpoint, beside which a head's weights are")
    found, _ = _get_resolved_checkpoint_files(
        pretrained_model_name_or_path=path,
        variant=None,
        gguf_file=None,
        use_safetensors=True,
        user_agent=None,
        is_remote_code=False,
    )
    return [Path(each) for each in found or ()]
