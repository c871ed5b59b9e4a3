"""What can be told of CANN and of the NPU without loading either."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

HOMES = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
USUAL = ("usr/local/Ascend/ascend-toolkit/latest", "usr/local/Ascend/cann", "usr/local/Ascend/latest")
LIBRARY = "libhccl.so"
VERSION_FILES = ("version.cfg", "compiler/version.info", "runtime/version.info", "*-linux/ascend_toolkit_install.info")


@dataclass(frozen=True)
class Cann:
    """`home`: where it is installed; `version`: as its files say; `loadable`: its libraries are on the search path of
    this environment; `devices`: the NPUs that the driver shows."""

    home: str | None
    version: str | None
    loadable: bool
    devices: tuple[str, ...]


def find_cann(environ: Mapping[str, str], root: Path = Path("/")) -> Cann:
    """`root`: of the file system to look at."""
    named = [Path(environ[name]) for name in HOMES if environ.get(name)]
    usual = [root / place for place in USUAL]
    home = next((place for place in [*named, *usual] if (place / "lib64").is_dir()), None)
    searched = [Path(place) for place in environ.get("LD_LIBRARY_PATH", "").split(":") if place]
    loadable = any((place / LIBRARY).exists() for place in searched)
    devices = sorted(each.name for each in (root / "dev").glob("davinci[0-9]*")) if (root / "dev").is_dir() else []
    return Cann(str(home) if home else None, _version(home), loadable, tuple(devices))


def _version(home: Path | None) -> str | None:
    for file in _files(home):
        found = re.search(r"(?im)^(?:\w+_)?version\s*=\s*\[?([\w.]+)", file.read_text())
        if found:
            return found.group(1)
    return None


def _files(home: Path | None) -> Iterable[Path]:
    if home is not None:
        for pattern in VERSION_FILES:
            yield from sorted(home.glob(pattern))
