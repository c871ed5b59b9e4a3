"""What a time holds for: one chip, and one set of versions of what runs on it. A file of times says which."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from npu_patch import devices
from npu_patch.version import __version__

PACKAGES = ("torch", "torch_npu", "triton", "triton-ascend", "transformers")


@dataclass(frozen=True)
class MeasuredOn:
    """`versions`: None for a package that is not installed. Names of packages, and CANN or CUDA."""

    chip: str
    versions: Mapping[str, str | None]

    def why_not(self, content: Mapping[str, Any]) -> str | None:
        """Why the times of a file do not hold here, if they do not: `content` has its `chip` and its `versions`."""
        if content["chip"] != self.chip:
            return f"it was measured on {content['chip']}, this is {self.chip}"
        for name in dict.fromkeys((*self.versions, *content["versions"])):
            there, here = content["versions"].get(name), self.versions.get(name)
            if there != here:
                return f"it was measured with {name} {there}, here is {here}"
        return None


def here(device: torch.device) -> MeasuredOn:
    """The simulated NPU has a real one's name, and is another chip."""
    versions = {"npu_patch": __version__, **{name: _version(name) for name in PACKAGES}}
    if device.type == "npu":
        versions["CANN"] = _cann()
    if device.type == "cuda":
        versions["CUDA"] = str(torch.version.cuda)
    if device.type == "cpu":
        return MeasuredOn(platform.processor() or "cpu", versions)
    chip = devices.chip(device)
    return MeasuredOn(f"simulated {chip}" if devices.is_simulated(device.type) else chip, versions)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cann() -> str | None:
    try:
        from torch_npu.npu.utils import get_cann_version

        return str(get_cann_version(module="CANN"))
    except Exception:  # an older torch_npu does not say
        return None
