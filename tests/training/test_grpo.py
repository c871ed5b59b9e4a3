"""GRPO by trl with completions over a static cache, as in scripts/grpo.py: the same rewards and gradients, fewer
launches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
SCRIPT = Path(__file__).parents[2] / "scripts" / "grpo.py"


@pytest.mark.parametrize("rollout", ["static", "continuous"])
def test_rewards_and_gradients_are_those_of_unpatched_training_and_the_reward_improves(rollout: str) -> None:
    command = [sys.executable, str(SCRIPT), "--rollout", rollout, "--steps", "6", "--tokens", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "rewards are the same" in done.stdout
    ratio = float(next(line for line in lines if line.startswith("launches: ")).split()[1])
    assert ratio < {"static": 0.3, "continuous": 0.7}[rollout]  # in float32, continuous batching takes no graph here
    ran = next(line for line in lines if line.startswith("ran: "))
    assert {"static": "captured_decode", "continuous": "generate_batch"}[rollout] in ran
