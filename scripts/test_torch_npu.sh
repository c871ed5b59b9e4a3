#!/usr/bin/env bash
# The parity tests on another genuine torch_npu, with the torch that belongs to it, on the simulated NPU:
#     scripts/test_torch_npu.sh [VERSION] [pytest arguments]     (default 2.9.0; some gigabytes of torch are downloaded)
# PYTHON as in scripts/demo.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

version=${1:-2.9.0}
shift || true
directory=${MATRIX:-$root/.venv-matrix}/torch_npu-$version
python=${PYTHON:-python3}
check_interpreter
check_compiler
if [[ ! -f $directory/npu_patch.stamp ]]; then
    "$python" -m venv "$directory"
    python=$directory/bin/python
    install "torch==$version" "numpy<2.3" optree pyyaml pytest "$(pinned transformers)" "$(pinned peft)" "$(pinned accelerate)"
    # It asks for torch==$version+cpu, which the package index does not have; the build there has the same interface.
    install --no-deps "torch_npu==$version"
    touch "$directory/npu_patch.stamp"
fi
python=$directory/bin/python
suite=(tests/test_parity.py::test_loss_and_every_gradient_in_float32 tests/test_attention_models.py tests/test_ops.py)
exec "$python" -m pytest -q "${@:-${suite[@]}}"
