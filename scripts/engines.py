# ruff: noqa: E402
"""Trains a patched model under each parallel engine, and compares loss and every gradient with those of one unpatched
process that has the whole batch.

    python scripts/engines.py                                 # two ranks: about four minutes on two cores
    python scripts/engines.py --ranks 4 --families qwen3 --engines FSDP DDP --lora both

On NPUs that communicate by HCCL: simulated ones, where there are no real ones. A cell of the table says how far the
worst gradient is off: `before` where `apply()` came before the engine's wrapping, `after` where it came after. "equal"
is within 1e-6 (float32), or within five times the unpatched process's own distance from float64, for what float32
cannot tell so well; under an engine that rounds to 16 bits, as far off as an unpatched model there. "as unpatched": the
engine refuses this model, or is itself as far off. Exit code 1: a cell is unequal.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from npu_patch import simulator

FAMILIES = ("qwen3", "qwen3_moe", "qwen3_5")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, choices=(2, 4))
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--engines", nargs="+", default=[], metavar="WORD", help="those whose name has one of these")
    parser.add_argument("--lora", choices=("yes", "no", "both"), default="both", help="where an engine takes adapters")
    parser.add_argument("--orders", nargs="+", default=["before", "after"], choices=("before", "after"))
    parser.add_argument("--half", action="store_true", help="each cell in one order, in turn: what the tests run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything that was found")
    parser.add_argument("--counts", action="store_true", help="collectives and bytes of a step, patched and unpatched")
    parser.add_argument("--served", action="store_true", help="say which patches ran, and what was left to originals")
    return parser.parse_args()


def launch(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each rank wrote down, by scripts/parallel/ranks.py."""
    start = ["-m", "torch.distributed.run"] if simulator.real_device() else ["-m", "npu_patch.simulator", "torchrun"]
    with tempfile.TemporaryDirectory() as folder:
        asked = {name: getattr(options, name) for name in ("families", "engines", "lora", "orders", "half", "counts")}
        Path(folder, "asked.json").write_text(json.dumps(asked))
        ranks = [
            "--standalone",
            "--nproc-per-node",
            str(options.ranks),
            str(ROOT / "scripts/parallel/ranks.py"),
            folder,
        ]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {"OMP_NUM_THREADS": "1", "HCCL_EXEC_TIMEOUT": "60", **os.environ, "PYTHONPATH": path}
        subprocess.run([sys.executable, "-W", "ignore", *start, *ranks], env=environment, check=True)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(options.ranks)]


def merged(cells: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """A cell is what the rank says that is furthest off."""
    return max(cells, key=lambda cell: (cell["status"] == "unequal", cell["error"]))


def table(cells: list[dict[str, Any]], ranks: int) -> str:
    """A row for each engine, family and kind of training, with a column for each order."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for cell in cells:
        row = rows.setdefault((cell["engine"], cell["family"], "LoRA" if cell["lora"] else "full"), {})
        row[cell["when"]] = " ".join(filter(None, [cell["status"], f"{cell['error']:.0e}", cell["reason"]]))
    lines = [
        f"| engine, {ranks} ranks | family | trained | apply() before | after |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [f"| {' | '.join(key)} | {row.get('before', '')} | {row.get('after', '')} |" for key, row in rows.items()]
    return "\n".join(lines)


def counts_table(cells: list[dict[str, Any]]) -> str:
    """What rank 0 called and sent in a step."""
    lines = ["| engine | family | trained | collectives | kB sent | by call | unpatched |", "|" + " --- |" * 7]
    for cell in cells:
        own, other = (
            [sum(each) for each in zip(*counts.values(), strict=True)] or [0, 0] for counts in counts_of(cell)
        )
        by_call = ", ".join(f"{calls} {name.removeprefix('Hccl')}" for name, (calls, _) in cell["collectives"].items())
        same = "the same" if own == other else f"{other[0]}, {other[1] / 1e3:.1f} kB"
        trained = "LoRA" if cell["lora"] else "full"
        row = (cell["engine"], cell["family"], trained, str(own[0]), f"{own[1] / 1e3:.1f}", by_call, same)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def counts_of(cell: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return cell["collectives"], cell["collectives unpatched"] or {}


def main() -> int:
    options = arguments()
    found = launch(options)
    cells = [merged(each) for each in zip(*found, strict=True)]
    print(table(cells, options.ranks))
    if not importlib.util.find_spec("deepspeed"):
        print("\nleft out: DeepSpeed, the package deepspeed is not installed")
    if options.counts:
        print(f"\n{counts_table([cell for cell in found[0] if cell['when'] == options.orders[0]])}")
    if options.served:
        for cell in cells:
            name = f"{cell['engine']}, {cell['family']}, {'LoRA' if cell['lora'] else 'full'}, {cell['when']}"
            print(f"\n{name}: ran {', '.join(cell['ran']) or 'nothing'}", *cell["left"], sep="\n    ")
    if options.json:
        options.json.write_text(json.dumps(cells, indent=1))
    unequal = [cell for cell in cells if cell["status"] == "unequal"]
    print(f"\n{len(cells)} cells, {len(unequal)} unequal")
    return 1 if unequal else 0


if __name__ == "__main__":
    sys.exit(main())
