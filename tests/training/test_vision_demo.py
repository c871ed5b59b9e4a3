"""scripts/vlm_finetune.py as a user runs it: a LoRA job on images, unpatched and patched."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="transformers has no processor of Qwen2.5-VL without torchvision")

from tests.training.test_demo import BFLOAT16_BAR, FLOAT32_BAR, ROOT, largest_differences, losses, per_step

SMALL = ("--steps", 6, "--batch-size", 4)


def finetune(*arguments: object) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "scripts" / "vlm_finetune.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("vision")
    done = finetune(*SMALL, "--output", folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_the_tower_and_the_language_model_are_patched(demo: tuple[str, Path]) -> None:
    output, _ = demo
    assert (
        "Qwen2.5-VL, small, random weights: LoRA rank 8 on all linear layers, bfloat16, 6 steps of 4 images" in output
    )
    for layer in ("Qwen2_5_VLRMSNorm", r"apply_rotary_pos_emb_vision \(qwen2_5_vl\)", "Qwen2_5_VLMLP", "Linear"):
        row = re.search(rf"^\w* +{layer} +[\d-]+ +(\d+) ", output, re.MULTILINE)
        assert row and int(row[1]) > 0, f"{layer} did not run patched:\n{output}"
    assert not re.search(r"^\w* +failed: ", output, re.MULTILINE)


def test_the_loss_curves_agree_and_fall(demo: tuple[str, Path]) -> None:
    output, folder = demo
    (unpatched,), (patched,), (apart,) = (
        losses(output, "unpatched"),
        losses(output, "patched"),
        largest_differences(output),
    )
    assert len(unpatched) == len(patched) == 6
    assert unpatched[-1] < 0.9 * unpatched[0]
    assert 0 < apart < BFLOAT16_BAR * unpatched[0]
    assert (folder / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    for run in ("unpatched", "patched"):
        assert (folder / "qwen2_5_vl" / run / "adapter_model.safetensors").is_file()


def test_the_patched_step_costs_less(demo: tuple[str, Path], simulated: None) -> None:
    output, _ = demo
    for row in ("kernel launches", "bytes moved", "peak memory"):
        ((before, after),) = per_step(output, row)
        assert after < before, row
    ((before, after),) = per_step(output, "waits for the host")
    assert after <= before


def test_float32_with_gradient_checkpointing(tmp_path: Path) -> None:
    done = finetune(
        "--steps", 3, "--batch-size", 2, "--dtype", "float32", "--gradient-checkpointing", "--output", tmp_path
    )
    assert done.returncode == 0, done.stderr
    (unpatched,), (apart,) = losses(done.stdout, "unpatched"), largest_differences(done.stdout)
    assert unpatched[-1] < unpatched[0] and apart < FLOAT32_BAR * unpatched[0]


@pytest.mark.parametrize(
    ("argument", "value", "accepted"),
    [("--steps", "0", "a whole number, at least 1"), ("--only", "both", "'unpatched', 'patched'")],
)
def test_an_argument_that_is_none_is_refused(argument: str, value: str, accepted: str) -> None:
    done = finetune(f"{argument}={value}")
    error = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and f"argument {argument}: " in error and f"'{value}'" in error and accepted in error


def test_the_job_of_text_has_the_text_and_this_one_has_not() -> None:
    done = finetune("--text", "x")
    assert done.returncode == 2 and "unrecognized arguments: --text" in done.stderr


def test_the_demo_tells_of_either_job() -> None:
    for arguments, script in (((), "lora_finetune"), (("--vision",), "vlm_finetune")):
        command = ["bash", str(ROOT / "scripts" / "demo.sh"), *arguments, "--help"]
        environment = {**os.environ, "PYTHON": sys.executable, "NO_VENV": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        assert f"ARGUMENTS, those of scripts/{script}.py:" in done.stdout and f"usage: {script}.py" in done.stdout
