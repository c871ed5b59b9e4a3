#!/usr/bin/env bash
# Every client, each in an environment of its own that is made here: starts, takes effect, computes the same?
#     scripts/clients/nightly.sh [--write] [ENVIRONMENT...]     (default: all of environment.sh)
# Prints the table of docs/clients.md, and writes it there with --write. Half an hour, and some gigabytes. Exit code 1
# where something is wrong. PEFT=FOLDER is a checkout of huggingface/peft, for its examples; CLIENTS, PYTHON, VENV and
# NO_VENV as in environment.sh.
set -uo pipefail
clients=$(dirname "${BASH_SOURCE[0]}")

write=()
if [[ ${1:-} == --write ]]; then
    write=(--write)
    shift
fi
chosen=("$@")
[[ ${#chosen[@]} != 0 ]] || chosen=(base ms-swift llamafactory twinkle axolotl)

found=$(mktemp --directory)
trap 'rm -rf "$found"' EXIT
code=0
for name in "${chosen[@]}"; do
    if ! interpreter=$("$clients/environment.sh" "$name"); then
        echo "$name: no environment" >&2
        code=1
        continue
    fi
    "$interpreter" "$clients/run.py" --environment "$name" ${PEFT:+--peft "$PEFT"} --json "$found/$name.json" || code=1
done
"$interpreter" "$clients/results.py" ${write[@]+"${write[@]}"} "$found"/*.json || code=1
exit "$code"
