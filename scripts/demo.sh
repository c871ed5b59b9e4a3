#!/usr/bin/env bash
# From a fresh clone to a LoRA fine-tuning on an NPU, of text or of images, without and with npu_patch.apply().
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

job=lora_finetune packages=(transformers peft accelerate matplotlib tqdm)
if [[ ${1:-} == --vision ]]; then
    job=vlm_finetune packages+=(torchvision)
    shift
fi

case ${1:-} in
    -h | --help)
        cat <<'HELP'
usage: scripts/demo.sh [--vision] [ARGUMENTS]

Makes a virtual environment (.venv) with everything that is needed, then runs scripts/lora_finetune.py ARGUMENTS in it,
or, with --vision before them, scripts/vlm_finetune.py ARGUMENTS.
On a machine with a working NPU, the interpreter that has it is used as it is, and only packages that it lacks are
added.

  PYTHON=...   the interpreter to start from (default: python3)
  VENV=...     where the virtual environment is made, or reused (default: .venv)
  NO_VENV=1    no virtual environment: use PYTHON as it is, and only add packages that it lacks

pip's own variables work too; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves some gigabytes of CUDA.

HELP
        echo "ARGUMENTS, those of scripts/$job.py:"
        echo
        exec "${PYTHON:-python3}" "$root/scripts/$job.py" --help
        ;;
esac

prepare_environment "${packages[@]}"
exec "$python" "$root/scripts/$job.py" "$@"
