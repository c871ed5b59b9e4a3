"""Seconds of `doctor`: until its first line is there, until its last, and of processor time with all its processes.

python scripts/time_doctor.py [python -m npu_patch.simulator -m npu_patch doctor ARGUMENTS]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

DOCTOR = [sys.executable, "-m", "npu_patch.simulator", "-m", "npu_patch", "doctor"]

if __name__ == "__main__":
    started = time.perf_counter()
    doctor = subprocess.Popen(sys.argv[1:] or DOCTOR, stdout=subprocess.PIPE, text=True)
    assert doctor.stdout is not None
    doctor.stdout.readline()
    first = time.perf_counter() - started
    doctor.stdout.read()
    doctor.wait()
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    last = time.perf_counter() - started
    print(
        f"exit code {doctor.returncode}: first line after {first:.1f} s, last after {last:.1f} s, "
        f"{spent.ru_utime + spent.ru_stime:.1f} s of processor time"
    )
