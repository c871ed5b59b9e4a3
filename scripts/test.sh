#!/usr/bin/env bash
# Sets everything up, then lints and tests. Arguments are pytest's: scripts/test.sh tests/training/test_demo.py -k png
# PYTHON, VENV and NO_VENV as in scripts/demo.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

prepare_environment transformers peft accelerate matplotlib rich tqdm pytest xdist ruff mypy

python_files=(setup.py npu_patch scripts tests) # not the examples in README.md, which ruff would reflow
"$python" -m ruff check "${python_files[@]}"
"$python" -m ruff format --check "${python_files[@]}"
if is_pinned torch; then # the annotations of another one differ
    "$python" -m mypy
fi
# Two workers with as many threads each as there are cores wait for each other: many tests take forty times as long.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [[ $# == 0 ]]; then
    scripts/test_matrix.sh --ci # other versions of transformers
    # On the simulated NPU with memory that is NaN until it is written, which no number of models makes more of a NaN.
    NPU_PATCH_SIMULATOR_POISON=1 "$python" -m pytest -n 2 tests/training/test_parity.py -k "not no_further_from_float64"
fi
# loadfile: the tests of one file share its models and its simulated device.
exec "$python" -m pytest -n 2 --dist loadfile "$@"
