#!/usr/bin/env bash
# The tests that concern torch_npu, on another genuine one with the torch that belongs to it, on the simulated NPU. What
# its operators lack is found by looking, in the tests as in the library: such a test is skipped with that reason.
#     scripts/test_torch_npu.sh [VERSION] [pytest arguments]     (default 2.9.0; a gigabyte of torch is downloaded)
# The last line is a row of the table in docs/versions.md. PYTHON and MATRIX as in scripts/test_matrix.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

version=${1:-2.9.0}
shift || true
torch_version=${version%%.post*}
directory=${MATRIX:-$root/.venv-matrix}/torch_npu-$version
python=${PYTHON:-python3}
check_interpreter
check_compiler
if [[ ! -f $directory/npu_patch.stamp ]]; then
    "$python" -m venv "$directory"
    python=$directory/bin/python
    # torch_npu asks for torch==$torch_version+cpu, which the package index does not have; the build there has the same
    # interface. Without dependencies: those of torch, and whoever asks for torch, bring gigabytes of CUDA.
    install --no-deps "torch==$torch_version" "torch_npu==$version" "$(pinned peft)" "$(pinned accelerate)"
    install filelock typing-extensions sympy networkx jinja2 fsspec "numpy<2.3" optree pyyaml rich psutil pytest \
        setuptools "$(pinned transformers)"
    "$python" scripts/without_cuda.py "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    touch "$directory/npu_patch.stamp"
fi
python=$directory/bin/python
suite=(
    tests/simulator tests/ops/test_ops.py tests/ops/attention tests/ops/experts tests/ops/gated_delta
    tests/patches/attention tests/patches/experts tests/patches/gated_delta tests/patches/test_older_signatures.py
    tests/serving/test_torch_npu_profiles.py tests/waiting/test_masks.py tests/measuring/test_selection.py
    tests/applying/test_lifecycle.py tests/applying/test_faults.py tests/reporting/test_report.py
    tests/training/test_checkpointed_layers.py tests/training/test_versions.py tests/training/test_parity.py
    tests/commands/verify/test_verify.py
)
log=$directory/npu_patch.log
code=0
"$python" -m pytest -rs "${@:-${suite[@]}}" 2>&1 | tee "$log" || code=$?
counted() { grep -oE "[0-9]+ $1" <<<"$(tail -n 1 "$log")" | grep -oE '[0-9]+' || echo 0; }
echo "| $version | $torch_version | $(counted passed) | $(counted failed) | $(counted skipped) |"
exit "$code"
