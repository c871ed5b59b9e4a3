#!/usr/bin/env bash
# Makes the environment of a client, once, and prints its interpreter: scripts/clients/environment.sh NAME
# NAME as in table.py. Over one shared torch and torch_npu lies what the client declares, at the versions named here.
#   CLIENTS=...   where these environments are made (default: .venv-clients)
# PYTHON, VENV and NO_VENV as in scripts/demo.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
source "$(dirname "${BASH_SOURCE[0]}")/../layered.sh"
cd "$root"

NAMES=(base ms-swift llamafactory twinkle axolotl)
declare -A WITH=(
    [ms-swift]="ms-swift==4.6.0"
    [llamafactory]="llamafactory==0.9.5"
    [twinkle]="twinkle-kit==0.5.1"
    # Without what it declares for CUDA, and for services: what is here is what `axolotl train` imports.
    [axolotl]="transformers==5.16.1 peft==0.20.0 accelerate==1.13.0 datasets==4.8.4 trl==1.9.0 kernels<0.17
        pydantic==2.12.5 typer==0.25.1 schedulefree==1.4.1 bitsandbytes==0.50.2 axolotl-contribs-lgpl==0.0.7
        axolotl-contribs-mit==0.0.6 evaluate==0.4.1 zstandard==0.22.0 posthog==6.7.11 python-dotenv==1.0.1
        addict colorama einops fastcore fire hf_transfer numba requests scipy wandb"
)

# torchrun for this interpreter; and what a package declares and cannot be loaded beside a torch without CUDA.
settle() {
    local torchrun=${layered_python%/*}/torchrun
    printf '#!%s\nfrom torch.distributed.run import main\n\nmain()\n' "$layered_python" >"$torchrun"
    chmod +x "$torchrun"
    case $1 in
        llamafactory)
            # torchvision is optional there, and torchaudio asks whether its extension exists.
            layered_pip uninstall --yes torchvision >/dev/null 2>&1
            rm -f "$(site_packages)"/torchaudio/lib/*.so
            ;;
        axolotl) layered_pip install --quiet --no-deps "axolotl==0.19.0" >&2 ;;
    esac
}

layered_pip() {
    "$python" -m pip --python "$layered_python" --disable-pip-version-check "$@"
}

name=${1:-}
[[ " ${NAMES[*]} " == *" $name "* ]] || fail "${name:-nothing} is no client's environment: accepted is ${NAMES[*]}"
prepare_environment transformers peft accelerate trl datasets
if [[ $name == base ]]; then
    echo "$python"
    exit
fi
layered_environment "${CLIENTS:-$root/.venv-clients}/$name" ${WITH[$name]} "$(pinned torch)" "$(pinned torch_npu)" \
    "numpy<2.3"
settle "$name"
echo "$layered_python"
