"""doctor: what is installed, what of it is used, what is wrong and what to do about it.

Imports neither torch nor anything that may be broken: other processes do. What needs no import is on the screen before.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from npu_patch.commands.console import standard_output
from npu_patch.commands.console.result import CommandError, Result
from npu_patch.commands.console.terminal import drawn, steps, table
from npu_patch.commands.doctor.faults import Complaint, complaints, variables_of, why_not_by_itself, wrong_switches
from npu_patch.commands.doctor.findings import OPERATORS, PACKAGES, Findings, at_first_sight, look
from npu_patch.commands.doctor.processes import Processes
from npu_patch.devices import is_simulated
from npu_patch.simulator.inherit import is_inherited
from npu_patch.switches import PREFIX, SWITCHES, TUNE, Switch, resolve
from npu_patch.version import __version__


def run(options: argparse.Namespace) -> Result:
    python = shutil.which(options.python)
    if python is None:
        raise CommandError(f"--python {options.python}: accepted is the path of a Python interpreter")
    if not options.timeout > 0:
        raise CommandError(f"--timeout {options.timeout:g}: accepted are seconds above 0")
    running = Processes()
    simulated = is_simulated() or is_inherited()
    seen = at_first_sight(running, python, os.environ, timeout=options.timeout, simulated=simulated)
    if not options.json:
        standard_output.write(drawn(_shown_at_first_sight(_content(seen, list(complaints(seen))))))
    with steps("looking around", options.json) as progress:
        findings = look(running, seen, timeout=options.timeout, progress=progress)
    found = list(complaints(findings))
    content = _content(findings, found)
    return Result(content, lambda: _shown(content), fine=not any(each.serious for each in found))


def _content(findings: Findings, found: list[Complaint]) -> dict[str, Any]:
    device = findings.torch_npu.found or {}
    closed_by = why_not_by_itself(findings)
    return {
        "npu_patch": __version__,
        "python": findings.python,
        "simulated": findings.simulated,
        "complaints": [asdict(each) for each in found],
        "packages": {name: _package(findings, name) for name in PACKAGES},
        "cann": asdict(findings.cann),
        "chips": device.get("chips", []),
        "operators": {
            name: {"used_by": used_by, "schema": device.get("operators", {}).get(name)}
            for name, used_by in OPERATORS.items()
        },
        "operators_unknown": findings.torch_npu.error,
        "providers": findings.providers.found or {},
        "providers_unknown": findings.providers.error,
        "by_itself": {"open": closed_by is None, "closed_by": closed_by},
        "switches": _switches(findings),
    }


def _package(findings: Findings, name: str) -> dict[str, str | None]:
    answer = findings.imports.get(PACKAGES[name])
    version = findings.version(name)
    return {"version": version, "error": None if version is None or answer is None else answer.error}


def _switches(findings: Findings) -> list[dict[str, Any]]:
    """Each switch's value; of one that is set wrongly as it is set, and the file of `tune`."""
    wrong = wrong_switches(findings.environ)
    set_wrongly = {name: v for switch in SWITCHES if switch.name in wrong for name, v in _given(switch, findings)}
    resolved = resolve({}, {name: value for name, value in findings.environ.items() if name not in set_wrongly})

    def row(switch: Switch) -> dict[str, Any]:
        error = wrong.get(switch.name)
        as_set = " and ".join(f"{name}={value}" for name, value in _given(switch, findings))
        return {
            "variable": PREFIX + switch.variable,
            "keyword": switch.name,
            "value": resolved[switch.name] if error is None else None,
            "source": resolved.sources[switch.name] if error is None else as_set,
            "gates": switch.gates,
            "error": error,
        }

    tune = {
        "variable": TUNE,
        "keyword": None,
        "value": resolved.tune,
        "source": TUNE if resolved.tune else "default",
        "gates": "the file of `tune` that apply() follows",
        "error": findings.tuning_file.error,
    }
    return [*map(row, SWITCHES), tune]


def _given(switch: Switch, findings: Findings) -> list[tuple[str, str]]:
    return [(name, findings.environ[name]) for name in variables_of(switch) if name in findings.environ]


def _shown_at_first_sight(content: dict[str, Any]) -> Iterator[Any]:
    yield f"npu_patch {content['npu_patch']}, examining {content['python']}"
    absent = [name for name, package in content["packages"].items() if package["version"] is None]
    yield f"not installed: {', '.join(absent) or 'none of them'}"
    cann = content["cann"]
    yield f"CANN: {cann['version'] or 'of unknown version'} in {cann['home']}" if cann["home"] else "CANN: not found"
    yield from (f"seen at once: {each['what']}" for each in content["complaints"])
    closed_by = content["by_itself"]["closed_by"]
    yield f"apply() by itself, once transformers is imported: {'yes' if closed_by is None else f'no: {closed_by}'}\n"
    rows = [
        (s["variable"], ("red", "wrong") if s["error"] else _word(s["value"]), s["source"], s["gates"])
        for s in content["switches"]
    ]
    yield table("Switches", ("variable", "value", "from", "gates"), rows)


def _shown(content: dict[str, Any]) -> Iterator[Any]:
    packages = [
        (name, package["version"], ("red", package["error"]) if package["error"] else "works")
        for name, package in content["packages"].items()
        if package["version"] is not None
    ]
    yield table("Packages", ("package", "version", "import"), packages)
    yield f"chip: {', '.join(content['chips']) or 'none'}{' (simulated)' if content['simulated'] else ''}\n"
    if content["operators_unknown"]:
        yield f"operators: cannot be told: {content['operators_unknown']}\n"
    else:
        rows: list[tuple[Any, ...]] = [
            (name, operator["used_by"], operator["schema"] or ("red", "this torch_npu does not have it"))
            for name, operator in content["operators"].items()
        ]
        yield table("Operators of this torch_npu", ("operator", "used by", "signature"), rows)
    if content["providers_unknown"]:
        yield f"providers: cannot be told: {content['providers_unknown']}\n"
    else:
        rows = [
            (op, name, ("green", "used") if used else "", why)
            for op, implementations in content["providers"].items()
            for name, used, why in implementations
        ]
        yield table("Providers, on an NPU", ("op", "provider", "", "why not"), rows)
    for each in content["complaints"]:
        yield f"{'FAULT' if each['serious'] else 'note'}: {each['fault']}: {each['what']}\n    {each['remedy']}"
    serious = sum(each["serious"] for each in content["complaints"])
    yield f"\n{serious} fault{'s' if serious > 1 else ''} found" if serious else "\nNothing wrong was found."


def _word(value: Any) -> str:
    return {True: "1", False: "0", None: "-"}.get(value, value)
