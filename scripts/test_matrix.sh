#!/usr/bin/env bash
# The tests that hold on every supported transformers, on each of them, over one shared torch; then the table of
# versions in docs/versions.md, or a check of it. PYTHON, VENV and NO_VENV as in scripts/demo.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
source "$(dirname "${BASH_SOURCE[0]}")/layered.sh"
cd "$root"

# Each is another code path somewhere in transformers. setup.cfg pins one of them.
VERSIONS=(4.57.6 5.2.0 5.9.0 5.12.1 5.14.1 5.15.1 5.17.0 5.20.2 5.23.0 5.24.0)
# Beside the cells of the table, each of which is a training too.
SUITE=(
    tests/applying/test_lifecycle.py tests/patches/test_older_signatures.py
    tests/patches/attention/test_attention_models.py tests/patches/gated_delta/test_gated_delta_versions.py
    tests/patches/experts/test_looped.py
    tests/training/test_parity.py::test_loss_and_every_gradient_in_float32
    tests/applying/test_faults.py::test_a_pickled_model_goes_between_patched_and_unpatched_processes
)
AT_ONCE=2
# Old versions are trained with the peft of their time.
declare -A WITH=([4.57.6]="peft==0.17.1")

usage() {
    cat <<HELP
usage: scripts/test_matrix.sh [--check | --ci] [VERSION...]

  (nothing)    every version, then writes the table into docs/versions.md
  VERSION...   these versions; the table is only compared
  --check      every version; the table is only compared
  --ci         the oldest version and one of the others, another one for each commit; the table is only compared

Versions: ${VERSIONS[*]}
HELP
}

choose_versions() {
    write_table=0
    chosen=("$@")
    case ${1:-} in
        -h | --help) usage && exit 0 ;;
        "") write_table=1 chosen=("${VERSIONS[@]}") ;;
        --check) chosen=("${VERSIONS[@]}") ;;
        --ci)
            local between=() each commits
            for each in "${VERSIONS[@]:1}"; do
                # The pinned one has the whole of the tests in scripts/test.sh.
                [[ transformers==$each == "$(pinned transformers)" ]] || between+=("$each")
            done
            commits=$(git rev-list --count HEAD 2>/dev/null || date +%j)
            chosen=("${VERSIONS[0]}" "${between[$((10#$commits % ${#between[@]}))]}")
            ;;
        -*) usage >&2 && exit 2 ;;
    esac
}

# In a process of its own, with its output in a file: two versions run at the same time.
test_version() {
    local version=$1
    layered_environment "$matrix/environments/$version" "transformers==$version" ${WITH[$version]:-}
    "$layered_python" -m tests.support.version_cells "$matrix/$version.json" || return 1
    "$layered_python" -m pytest -p no:cacheprovider "${SUITE[@]}"
}

choose_versions "$@"
prepare_environment transformers peft accelerate pytest
if [[ $write_table == 1 ]] && ! "$python" -c 'import triton' 2>/dev/null; then
    fail "the table has a row for Triton kernels, and $python has no triton: see setup.cfg"
fi
matrix=${MATRIX:-$root/.venv-matrix}
mkdir -p "$matrix/environments"
echo "matrix: transformers ${chosen[*]}"

declare -A job
for version in "${chosen[@]}"; do
    while (($(jobs -rp | wc -l) >= AT_ONCE)); do wait -n || true; done
    rm -f "$matrix/$version.json"
    test_version "$version" >"$matrix/$version.log" 2>&1 &
    job[$version]=$!
done

failed=()
for version in "${chosen[@]}"; do
    if ! wait "${job[$version]}"; then
        failed+=("$version")
        tail -n 60 "$matrix/$version.log"
    fi
    echo "matrix: transformers $version: $(tail -n 1 "$matrix/$version.log")"
done
[[ ${#failed[@]} == 0 ]] || fail "the tests fail on transformers ${failed[*]}: $matrix/VERSION.log"

files=("${chosen[@]/#/$matrix/}")
if [[ $write_table == 1 ]]; then
    "$python" scripts/version_table.py "${files[@]/%/.json}"
else
    "$python" scripts/version_table.py --check "${files[@]/%/.json}" || fail "run scripts/test_matrix.sh"
fi
