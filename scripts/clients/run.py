"""Runs the tools that people train with by their own command lines, unpatched and patched, and compares their losses.

    python scripts/clients/run.py [--clients 'trl sft' ...] [--python PYTHON] [--json FILE]

A row of table.py each: unpatched, by TWINKLE_NPU_AUTO, by `python -m npu_patch run`; no line of a script is edited.
Says for each whether it starts, how far losses and gradients are apart, and what ran. A client whose packages PYTHON
does not have is left out, and named. On the simulated NPU unless this machine has one. Exit code 1 where a client does
not start, computes something else, or nothing of npu_patch ran in it.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from npu_patch import simulator
from scripts.clients.table import CLIENTS, Client
from tests.support.installed import PYTHON, installed

NUMBERS = ("loss", "grad_norm", "reward", "completions/mean_length")
NEAR = 1e-4  # of those in float32, relative
WAYS = ("unpatched", "variable", "run")
VERSIONS = """
import importlib.metadata as m, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


@dataclass
class Found:
    """Of one client. `numbers`: losses, norms of gradients and rewards, step by step; `apart`: by the way it was
    patched, the largest relative distance from the unpatched ones; `ran`: patches of which something ran; `wrong`: why
    it is not as it should be."""

    client: str
    versions: dict[str, str]
    numbers: dict[str, list[float]] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)
    ran: dict[str, list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def said(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        ways = [
            f"{way}: losses and gradients {far:.1e} apart, ran {', '.join(self.ran[way])}"
            for way, far in self.apart.items()
        ]
        return "\n    ".join([f"{self.client} ({versions})", *ways, *(f"WRONG: {each}" for each in self.wrong)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [client.name for client in CLIENTS]
    parser.add_argument("--clients", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--python", default=sys.executable, help="of the environment that has the clients")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    options = parser.parse_args()
    every = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([*PYTHON, str(ROOT / "scripts" / "clients" / "material.py"), name], check=True)
        for client in (each for each in CLIENTS if each.name in options.clients):
            versions = versions_of(options.python, ("torch", "transformers", *client.packages))
            absent = [package for package, version in versions.items() if version is None]
            if absent:
                print(f"{client.name}: left out, {options.python} has no {', '.join(absent)}", flush=True)
                continue
            every.append(compared(client, options.python, folder, versions))
            print(every[-1].said(), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(each) for each in every], indent=2))
    sys.exit(any(each.wrong for each in every))


def versions_of(python: str, packages: Sequence[str]) -> dict[str, str]:
    told = subprocess.run([python, "-c", VERSIONS, *packages], capture_output=True, text=True, check=True)
    return json.loads(told.stdout)


def compared(client: Client, python: str, folder: Path, versions: dict[str, str]) -> Found:
    found = Found(client.name, versions)
    for way in WAYS:
        at = folder / f"{client.name} {way}".replace(" ", "_").replace(",", "")
        at.mkdir()
        done = started(client, way, python, folder, at)
        if done.returncode:
            found.wrong.append(f"{way}: exit code {done.returncode}: {done.stderr.strip()[-1500:]}")
            return found
        found.numbers[way] = numbers_in(at)
        if way == WAYS[0]:
            continue
        pairs = list(zip(found.numbers[way], found.numbers[WAYS[0]], strict=True))
        found.apart[way] = max(abs(one - other) / max(abs(other), 1e-2) for one, other in pairs)
        outcomes = json.loads((at / "report.json").read_text())["outcomes"]
        found.ran[way] = list(dict.fromkeys(each["patch"] for each in outcomes if each["ran"]))
        if not found.apart[way] <= NEAR:
            found.wrong.append(f"{way}: {found.numbers[way]}, unpatched {found.numbers[WAYS[0]]}")
        if not found.ran[way]:
            found.wrong.append(f"{way}: nothing of npu_patch ran")
    return found


def started(client: Client, way: str, python: str, folder: Path, at: Path) -> subprocess.CompletedProcess[str]:
    places = {"material": folder, "out": at / "out", "scripts": ROOT / "scripts" / "clients"}
    command = [part.format(**places) for part in client.command]
    environment = installed(at / "installed") | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if way == "variable":
        environment |= {"TWINKLE_NPU_AUTO": "1", "TWINKLE_NPU_REPORT": str(at / "report.json")}
    elif way == "run":
        command = ["-m", "npu_patch", "run", "--report", str(at / "report.json"), *command]
    if simulator.real_device() is None:
        command = ["-m", "npu_patch.simulator", "--devices", str(client.ranks), *command]
    elif way != "run":
        command[0] = str(Path(python).parent / command[0])
    quiet = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.run([python, *command], cwd=at, env=environment, check=False, **quiet)


def numbers_in(folder: Path) -> list[float]:
    """Of each step, as the Trainer of the client wrote them down."""
    (state,) = folder.rglob("checkpoint-*/trainer_state.json")
    history = json.loads(state.read_text())["log_history"]
    return [entry[name] for entry in history for name in NUMBERS if name in entry]


if __name__ == "__main__":
    main()
