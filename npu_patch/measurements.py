"""What was measured on this device with these versions, kept between processes in one JSON file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from npu_patch import log
from npu_patch.measure import Measured
from npu_patch.version import __version__

FORMAT = 1


@dataclass(frozen=True)
class Machine:
    """What a time holds for: the device's name and the versions of what runs on it."""

    device: str
    versions: Mapping[str, str]

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"{re.sub('[^A-Za-z0-9]+', '-', self.device)}-{digest}.json"


def this_machine(device: torch.device) -> Machine:
    versions = {"npu_patch": __version__, "torch": torch.__version__}
    for distribution in ("torch_npu", "triton", "triton-ascend"):
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "npu":
        versions["CANN"] = _cann()
    if device.type == "cuda":
        versions["CUDA"] = str(torch.version.cuda)
    name = platform.processor() if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)
    return Machine(name or device.type, versions)


def _cann() -> str:
    try:
        from torch_npu.npu.utils import get_cann_version

        return str(get_cann_version(module="CANN"))
    except Exception:  # an older torch_npu does not say
        return ""


def default_path(machine: Machine) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "npu_patch" / machine.file_name


@dataclass
class Measurements:
    """By case, by alternative. `read` ignores, with one line of log, a file that is damaged or of another machine."""

    path: Path
    machine: Machine
    measured: dict[str, dict[str, Measured]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, machine: Machine) -> Measurements:
        found = cls(path, machine)
        try:
            found.measured = _parsed(json.loads(path.read_text(encoding="utf-8")), machine)
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever stands there, it is measured anew
            log.warning(f"{path} is ignored: {error}")
        return found

    def of(self, case: str, alternative: str) -> Measured | None:
        return self.measured.get(case, {}).get(alternative)

    def keep(self, case: str, alternative: str, measured: Measured) -> None:
        self.measured.setdefault(case, {})[alternative] = measured

    def write(self) -> None:
        """Atomically: a reader sees the old file or the new one. One that cannot be written is a line of log."""
        content = {"format": FORMAT, **asdict(self.machine), "measured": _plain(self.measured)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".tmp")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump(content, file, indent=1)
                os.replace(temporary, self.path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            log.warning(f"times are not kept: {error}")


def _plain(measured: Mapping[str, Mapping[str, Measured]]) -> dict[str, Any]:
    return {case: {name: asdict(each) for name, each in found.items()} for case, found in measured.items()}


def _parsed(content: Any, machine: Machine) -> dict[str, dict[str, Measured]]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not a file of times in format {FORMAT}")
    if content.get("device") != machine.device:
        raise ValueError(f"times of the device {content.get('device')!r}, not {machine.device!r}")
    if content.get("versions") != dict(machine.versions):
        raise ValueError(f"times with {content.get('versions')}, not {dict(machine.versions)}")
    return {
        case: {name: _measured(**each) for name, each in found.items()} for case, found in content["measured"].items()
    }


def _measured(wrong: Any, seconds: Any) -> Measured:
    number = seconds is None or (isinstance(seconds, float) and 0.0 < seconds < float("inf"))
    if not number or not (wrong is None or isinstance(wrong, str)) or (seconds is None) == (wrong is None):
        raise ValueError(f"no measurement: wrong={wrong!r}, seconds={seconds!r}")
    return Measured(wrong, seconds)
