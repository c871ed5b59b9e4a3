#!/usr/bin/env bash
# Makes docs/first_five_minutes.md anew: a new user's first commands, typed in an environment that has torch,
# transformers and accelerate, and no npu_patch yet.
#     scripts/first_five_minutes.sh [--write]     (without it, the page is printed)
# PYTHON, VENV and NO_VENV as in scripts/demo.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

page=()
if [[ ${1:-} == --write ]]; then page=(--page "$root/docs/first_five_minutes.md"); fi
prepare_environment transformers accelerate
start=(-m npu_patch.simulator)
if has_npu; then start=(); fi

place=$(mktemp --directory)
trap 'rm -rf "$place"' EXIT
mkdir "$place/npu_patch" "$place/session"
git ls-files -z | tar --create --null --files-from - | tar --extract --directory "$place/npu_patch"
"$python" -m venv "$place/env"
# Behind the environment's own packages.
"$python" -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
    >"$("$place/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/behind.pth"
"$python" "${start[@]}" scripts/clients/material.py "$place/session" >/dev/null 2>&1

# The simulator comes from here, whatever else is found where it is started.
run="$root/scripts/first_five_minutes.py"
cd "$place/session"
"$place/env/bin/python" "${start[@]}" "$run" --source "$place/npu_patch" ${page[@]+"${page[@]}"}
