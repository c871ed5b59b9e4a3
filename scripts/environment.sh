# Sourced by demo.sh and test.sh: `prepare_environment MODULE...` makes an environment that has these modules and sets
# `python` to its interpreter.
#
#   PYTHON=...   the interpreter to start from (default: python3)
#   VENV=...     where the virtual environment is made, or reused (default: .venv)
#   NO_VENV=1    no virtual environment: use PYTHON as it is, and only add packages that it lacks
#
# An interpreter with a working NPU is always used as it is. Nothing that it has is replaced.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

# Its declared requirements do not resolve beside torch 2.13.0, so it is installed without them.
triton_ascend='triton-ascend==3.2.0'

prepare_environment() {
    python=${PYTHON:-python3}
    check_interpreter
    if has_npu; then
        echo "environment: $python has a working NPU: used as it is" >&2
        add_what_is_missing "$@"
    elif [[ ${NO_VENV:-0} == 1 ]]; then
        echo "environment: $python, used as it is" >&2
        check_compiler
        add_what_is_missing "$@"
    else
        check_compiler
        make_virtual_environment
    fi
}

check_interpreter() {
    local version
    command -v "$python" >/dev/null || fail "PYTHON=$python is not a program: accepted is Python 3.10, 3.11 or 3.12"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "PYTHON=$python does not run"
    case $version in
        3.10 | 3.11 | 3.12) ;;
        *) fail "PYTHON=$python is Python $version: torch_npu has wheels for 3.10, 3.11 and 3.12" ;;
    esac
}

# The simulated NPU compiles a stub of CANN's libraries at first use.
check_compiler() {
    local name
    if [[ -n ${CC:-} ]]; then return; fi
    for name in cc gcc clang; do
        if command -v "$name" >/dev/null; then return; fi
    done
    fail "no C compiler (cc, gcc, clang), which the simulated NPU needs: apt-get install gcc, or set CC"
}

has_npu() {
    "$python" -c 'import torch, torch_npu, sys; sys.exit(not torch.npu.is_available())' >/dev/null 2>&1
}

make_virtual_environment() {
    local venv=${VENV:-$root/.venv} stamp wanted
    stamp=$venv/npu_patch.stamp
    wanted=$(cat "$root/setup.cfg" "$root/scripts/environment.sh" | sha256sum)
    if [[ ! -x $venv/bin/python ]]; then
        echo "environment: making $venv" >&2
        "$python" -m venv "$venv" || fail "no virtual environment at $venv: apt-get install python3-venv"
    fi
    python=$venv/bin/python
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then return; fi
    # torch first: a resolver that meets torch_npu first may settle on another torch.
    install "$(pinned torch)"
    install --editable "$root[dev]"
    install --no-deps "$triton_ascend"
    echo "$wanted" >"$stamp"
}

# The requirement as setup.cfg has it, such as torch==2.13.0.
pinned() {
    sed -n "s/^ *\($1==[^ ]*\)$/\1/p" "$root/setup.cfg"
}

# Whether this environment has the module at the version of setup.cfg.
is_pinned() {
    local version
    version=$("$python" -c "import importlib.metadata as m; print(m.version('$1').split('+')[0])") || return 1
    [[ "$1==$version" == "$(pinned "$1")" ]]
}

# What is there already stays at its version.
add_what_is_missing() {
    local module missing=() constraints
    for module in "$@"; do
        "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" ||
            missing+=("${module/xdist/pytest-xdist}")
    done
    if [[ ${#missing[@]} == 0 ]]; then return; fi
    constraints=$(mktemp)
    "$python" -m pip list --format=freeze --exclude-editable >"$constraints"
    install --constraint "$constraints" "${missing[@]}"
    rm "$constraints"
}

install() {
    echo "environment: pip install $*" >&2
    "$python" -m pip install --quiet --disable-pip-version-check "$@" || fail "pip install $* failed"
}

fail() {
    echo "error: $*" >&2
    exit 2
}
