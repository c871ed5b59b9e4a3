"""One step under accelerate's `sp_size`, DeepSpeed's Ulysses, against one process with whole sequences.

    python -m npu_patch.simulator torchrun --nproc-per-node 2 scripts/deepspeed_sp.py --when before --lora

The highest relative error of loss and gradients. A process for each step: DeepSpeed's groups and its entry in
transformers' registry outlast its model, so this is no row of scripts/engines.py. Needs the package deepspeed.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist

from npu_patch.commands.replay.bars import FLOORS, relative_error
from scripts.parallel.case import Case, gradients, ids, npu, plain, rank
from scripts.parallel.deepspeeds import MISSING, one_row, ulysses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--when", choices=("never", "before", "after"), default="before", help="of apply()")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--family", default="qwen3")
    asked = parser.parse_args()
    if MISSING:
        print(f"skipped: {MISSING}")
        return 0
    warnings.simplefilter("ignore")
    torch.npu.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo,npu:hccl")
    model = plain(asked.family, asked.lora).to(npu())
    batch, labels = one_row(ids())
    loss = model(input_ids=batch, labels=labels, shift_labels=labels, use_cache=False).loss
    loss.backward()
    expected = {"loss": loss.detach().cpu().double().reshape(1), **gradients(model)}
    case = Case(asked.family, asked.lora, asked.when)
    found = ulysses(case)
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name])
    if rank() == 0:
        print(f"{asked.when}: {errors[worst]:.1e} of {worst}; ran {', '.join(case.ran()) or 'nothing'}", flush=True)
    return 0 if errors[worst] < FLOORS[torch.float32] else 1


if __name__ == "__main__":
    os._exit(main())
