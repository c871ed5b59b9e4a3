"""The demo's first steps several times over while other work has the cores: are they the same, bit for bit?

    python scripts/repeat_under_load.py [--times 10] [--load 4] [--steps 3]

Each run trains both models of the demo, unpatched and patched; what is compared are the adapters that it saves, every
bit of which depends on every loss before. The exit code is 1 if two runs differ.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

SCRIPTS = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--load", type=int, default=4, help="processes that do nothing but use the processor")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    busy = [
        multiprocessing.get_context("spawn").Process(target=_spin, args=(os.getpid(),)) for _ in range(options.load)
    ]
    for process in busy:
        process.start()
    found: Counter[str] = Counter()
    try:
        for turn in range(options.times):
            digest = adapters_after(options.steps)
            found[digest] += 1
            load = os.getloadavg()[0]
            print(f"run {turn + 1} of {options.times}: adapters {digest[:16]}, load average {load:.1f}", flush=True)
    finally:
        for process in busy:
            process.kill()
    print(f"{options.times} runs, {len(found)} different result{'s' if len(found) > 1 else ''}")
    return int(len(found) > 1)


def adapters_after(steps: int) -> str:
    """One hash of all adapters that the demo saves."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(SCRIPTS / "lora_finetune.py"), "--steps", str(steps), "--output", folder]
        environment = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        files = sorted(Path(folder).rglob("*.safetensors"))
        if done.returncode or not files:
            raise SystemExit(f"lora_finetune.py ended with {done.returncode}:\n{done.stderr[-2000:]}")
        hashes = (hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
        return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _spin(parent: int) -> None:
    while os.getppid() == parent:  # and no longer
        sum(range(100000))


if __name__ == "__main__":
    sys.exit(main())
