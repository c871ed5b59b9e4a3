"""Trains a tiny model with npu_patch, saves a checkpoint after each step, and prints each step's loss.

python tests/support/interrupted_training.py CHECKPOINT STEPS DIE_IN   # continues from CHECKPOINT if there is one

In the backward pass of step DIE_IN the process kills itself, as the system or a scheduler would (SIGKILL). -1: never.
"""

# ruff: noqa: E402
from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])

from npu_patch import simulator

if simulator.real_device() is None:
    simulator.start()

import torch

import npu_patch
from tests.support.tiny_models import tiny, tiny_batch


def main(checkpoint: Path, steps: int, die_in: int) -> None:
    model = tiny("qwen3").to("npu").train()
    npu_patch.apply(model, strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"] + 1
    for step in range(first, steps):
        batch = {name: tensor.to("npu") for name, tensor in tiny_batch(seed=step).items()}
        loss = model(**batch).loss
        if step == die_in:
            model.model.embed_tokens.weight.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(saved, f"{checkpoint}.part")
        os.replace(f"{checkpoint}.part", checkpoint)
        print(step, loss.item().hex(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
