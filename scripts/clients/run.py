"""Runs the tools that people train with by their own command lines, unpatched and patched, and compares their losses.

    python scripts/clients/run.py [--environment NAME] [--clients 'trl sft' ...] [--json FILE]

Each row of table.py that this interpreter's environment has (environment.sh makes them): unpatched, and patched in each
of its ways. Says whether it starts, how far losses and gradients are apart, what ran, and what was left to a tool whose
own patches are on. On the simulated NPU unless this machine has one. Exit code 1 where a client does not start,
computes something else, or a patch that should have run or been left to the tool by name did neither.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from npu_patch import simulator
from scripts.clients.results import as_markdown
from scripts.clients.table import CLIENTS, Client, Way
from tests.support.installed import PYTHON, installed

NUMBERS = ("loss", "grad_norm", "reward", "completions/mean_length")
NEAR = 1e-4  # of those in float32, relative
UNPATCHED = "unpatched"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "WANDB_MODE": "offline",
}


@dataclass
class Found:
    """Of one client. `numbers`: losses, norms of gradients and rewards, step by step; by the way it was patched,
    `apart`: the largest relative distance from the unpatched ones, `ran`: patches of which something ran, `left`: those
    of the table that the report leaves to `tool` by name; `wrong`: why it is not as it should be."""

    client: str
    versions: dict[str, str]
    tool: str
    lines: dict[str, str]
    numbers: dict[str, list[float]] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)
    ran: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def said(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        ways = [
            f"{way}: losses and gradients {far:.1e} apart, ran {', '.join(self.ran[way])}"
            + (f"; {self.tool}'s: {', '.join(self.left[way])}" if self.left[way] else "")
            for way, far in self.apart.items()
        ]
        return "\n    ".join([f"{self.client} ({versions})", *ways, *(f"WRONG: {each}" for each in self.wrong)])


def main() -> None:
    options = _options()
    every = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([*PYTHON, str(ROOT / "scripts" / "clients" / "material.py"), name], check=True)
        if simulator.real_device() is None:
            _pretend_tools(folder / "bin")
        for client in (each for each in CLIENTS if each.name in options.clients):
            if client.environment not in (options.environment, options.environment or client.environment):
                continue
            versions = {name: _version(name) for name in ("torch", "transformers", *client.packages)}
            absent = [package for package, version in versions.items() if version is None]
            if not absent and options.peft is None and any("{peft}" in part for part in client.command):
                absent = ["--peft FOLDER"]
            if absent:
                print(f"{client.name}: left out: no {', '.join(absent)}", flush=True)
                continue
            places = {
                "material": folder,
                "scripts": ROOT / "scripts" / "clients",
                "peft": options.peft and options.peft.resolve(),
            }
            every.append(compared(client, places, {name: version or "" for name, version in versions.items()}))
            print(every[-1].said(), flush=True)
            if options.json is not None:  # at once: a run takes minutes
                options.json.write_text(json.dumps([asdict(each) for each in every], indent=2))
    print(as_markdown(map(asdict, every)))
    sys.exit(any(each.wrong for each in every))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [client.name for client in CLIENTS]
    parser.add_argument("--clients", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    environments = list(dict.fromkeys(client.environment for client in CLIENTS))
    parser.add_argument("--environment", choices=environments, help="only its clients")
    parser.add_argument("--peft", type=Path, metavar="FOLDER", help="a checkout of huggingface/peft, for its examples")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there, for results.py")
    return parser.parse_args()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _pretend_tools(folder: Path) -> None:
    """twinkle takes a machine for one with NPUs where the vendor's npu-smi is."""
    folder.mkdir()
    (folder / "npu-smi").write_text("#!/bin/sh\n")
    (folder / "npu-smi").chmod(0o755)


def compared(client: Client, places: dict[str, Any], versions: dict[str, str]) -> Found:
    tool, left = client.theirs
    found = Found(client.name, versions, tool, {way.name: way.lines for way in client.ways})
    for way in (Way(UNPATCHED, ""), *client.ways):
        at = places["material"] / f"{client.name} {way.name}".replace(" ", "_").replace(",", "").replace("/", "_")
        at.mkdir()
        done = started(client, way, places, at)
        if done.returncode:
            found.wrong.append(f"{way.name}: exit code {done.returncode}: {done.stderr.strip()[-1500:]}")
            return found
        numbers = found.numbers[way.name] = numbers_in(at)
        if way.name == UNPATCHED:
            continue
        pairs = list(zip(numbers, found.numbers[UNPATCHED], strict=True))
        found.apart[way.name] = max(abs(one - other) / max(abs(other), 1e-2) for one, other in pairs)
        if not found.apart[way.name] <= NEAR:
            found.wrong.append(f"{way.name}: {numbers}, unpatched {found.numbers[UNPATCHED]}")
        report = json.loads((at / "report.json").read_text())
        found.ran[way.name] = list(dict.fromkeys(each["patch"] for each in report["outcomes"] if each["ran"]))
        found.left[way.name] = [each for each in left if each in left_to(tool, report)]
        found.wrong += [f"{way.name}: {each} did not run" for each in client.ran if each not in found.ran[way.name]]
        unnamed = [each for each in left if each not in found.left[way.name] and each not in found.ran[way.name]]
        found.wrong += [f"{way.name}: {each} did not run, and the report names nobody" for each in unnamed]
    return found


def left_to(tool: str, report: dict[str, Any]) -> set[str]:
    """The patches that the report says `tool` stands in the place of."""
    said = [f"{each['patch']}: {each['reason']}" for each in report["outcomes"]] + report["warnings"]
    named = [line.split(": ")[0].split(", ") for line in said if f"({tool}; " in line]
    return {patch for patches in named for patch in patches}


def started(client: Client, way: Way, places: dict[str, Any], at: Path) -> subprocess.CompletedProcess[str]:
    report = str(at / "report.json")
    command = [part.format(**places, out=at / "out") for part in (*client.command, *way.options)]
    environment = installed(at / "installed") | OFFLINE | dict(client.variables)
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), str(places["material"] / "bin"), environment["PATH"]]
    )
    if way.variable:
        environment |= {"TWINKLE_NPU_AUTO": "1", "TWINKLE_NPU_REPORT": report}
    elif way.options:
        environment |= {"CLIENT_REPORT": report}
    if way.run:
        command = ["-m", "npu_patch", "run", "--report", report, *command]
    if simulator.real_device() is None:
        command = ["-m", "npu_patch.simulator", "--devices", str(client.ranks), *command]
    elif not way.run and not command[0].endswith(".py"):
        command[0] = str(Path(sys.executable).parent / command[0])
    quiet: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.run([sys.executable, *command], cwd=at, env=environment, check=False, **quiet)


def numbers_in(folder: Path) -> list[float]:
    """Of each step, as the Trainer of the client wrote them down."""
    (state, *_) = sorted(folder.rglob("checkpoint-*/trainer_state.json"))
    history = json.loads(state.read_text())["log_history"]
    return [entry[name] for entry in history for name in NUMBERS if name in entry]


if __name__ == "__main__":
    main()
