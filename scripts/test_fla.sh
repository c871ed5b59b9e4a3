#!/usr/bin/env bash
# The genuine fla-core with its Ascend backend, beside everything that scripts/test.sh has: its kernels in triton's
# interpreter on the simulated NPU, and through the vendor's compiler for a real chip.
#     scripts/test_fla.sh [VERSION]     (default 0.6.0)
# PYTHON, VENV and NO_VENV as in scripts/demo.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$(dirname "${BASH_SOURCE[0]}")/layered.sh"
cd "$root"

version=${1:-0.6.0}
prepare_environment transformers peft accelerate pytest
layered_environment "${MATRIX:-$root/.venv-matrix}/environments/fla-$version" "fla-core==$version"
exec "$layered_python" -m pytest -q -rs tests/patches/gated_delta/test_fla_core.py
