"""Tunes with real timings while fast wrong implementations are offered, then times what apply() makes of the file.

    python scripts/tune_with_intruders.py --device cuda --types qwen3 qwen3_moe --tokens 2048

Beside the implementations that the machine has, each of RMSNorm, RoPE and SwiGLU is offered one that is fast and wrong.
Says what was refused and why, the times of every alternative, and for each op the time with the file in place against
the original's. Exit code 1 if a wrong one was chosen, or an op that the file leaves to the original is replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from npu_patch.commands import main
from npu_patch.measuring.decision import ORIGINAL
from npu_patch.patches import CATALOGUE
from npu_patch.serving.implementation import Implementation

INTRUDER = "fast and wrong"
WRONG = {
    "rms_norm": lambda variant, x, *rest: x * 1.0,
    "rope": lambda tensors, *rest: [x * 1.0 for x in tensors],
    "swiglu": lambda gate, up=None: (gate if up is not None else gate.chunk(2, -1)[0]) * 1.0,
}


@contextlib.contextmanager
def intruders() -> Iterator[None]:
    """Offers the wrong implementations to `tune`."""
    with_intruders = tuple(
        replace(patch, op=replace(patch.op, implementations=(*patch.op.implementations, _intruder(patch))))
        if patch.name in WRONG
        else patch
        for patch in CATALOGUE
    )
    with (
        mock.patch("npu_patch.commands.tune.command.CATALOGUE", with_intruders),
        mock.patch("npu_patch.applying.api.CATALOGUE", with_intruders),
    ):
        yield


def _intruder(patch: Any) -> Implementation:
    takes = patch.op.implementations[-1].unsupported
    return Implementation(INTRUDER, ("npu", "cuda", "cpu"), WRONG[patch.name], takes)


def command(*arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON of `python -m npu_patch ...`."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main([*arguments, "--json"])
    if code == 2:
        sys.exit(2)
    return code, json.loads(printed.getvalue())


def times_of(decision: dict[str, Any]) -> dict[str, float]:
    found = {name: each["seconds"] for name, each in decision["measured"].items()}
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def tune_and_bench(model_type: str, options: argparse.Namespace, folder: Path) -> bool:
    """Prints what was found; whether all is well."""
    file = folder / f"{model_type}.json"
    sizes = ["--device", options.device, "--tokens", str(options.tokens), "--samples", str(options.samples)]
    with intruders():
        code, tuned = command("tune", model_type, *sizes, "--output", str(file))
    print(f"{model_type} on {tuned['device']} ({tuned['chip']}), {options.tokens} tokens; exit code of tune {code}")
    for each in tuned["decisions"]:
        times = ", ".join(f"{name} {seconds * 1e3:.3f}" for name, seconds in times_of(each).items())
        print(f"  {each['patch']} {each['site']} [{each['shapes'][:90]}]: {times} ms -> {each['choice']}")
        for name, found in each["measured"].items():
            if found["wrong"] is not None:
                print(f"      not {name}: {found['wrong']}")
    with mock.patch.dict(os.environ, {"TWINKLE_NPU_TUNE": str(file)}):
        _, with_file = command("bench", model_type, *sizes)
    _, without = command("bench", model_type, *sizes)
    for name, found in (("with the file", with_file), ("without", without)):
        for each in found["results"]:
            gain = "-" if each["gain"] is None else f"{each['gain']:.3f} times"
            print(f"  bench {name}: {each['patch']} {each['site']} [{each['shapes'][:60]}]: {gain}")
    chosen = [each for each in tuned["decisions"] if each["choice"] == INTRUDER]
    timed = [(times_of(each), each["choice"]) for each in tuned["decisions"]]
    slower = [choice for times, choice in timed if times and times[ORIGINAL] < times[choice]]
    seen = [each for each in tuned["refused"] if each.startswith(INTRUDER)]
    print(f"  intruders refused {len(seen)}, chosen {len(chosen)}; slower than the original {len(slower)}", flush=True)
    return not chosen and not slower and bool(seen)


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="npu")
    parser.add_argument("--types", nargs="+", default=["qwen3"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fine = [tune_and_bench(model_type, options, Path(folder)) for model_type in options.types]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(run())
