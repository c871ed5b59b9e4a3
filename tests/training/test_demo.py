"""scripts/lora_finetune.py as a user runs it: what it prints, what it leaves behind, what it refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from npu_patch import simulator

ROOT = Path(__file__).parents[2]

# One part in 256 is the spacing of bfloat16: the two runs round at different places, so their losses may be one apart.
# In float32 the same job agrees to a few units of float32: 4e-6 of the loss, where a SwiGLU whose gradient is a tenth
# too small shows as 1.6e-5 (tried on the job below).
BFLOAT16_BAR = 2**-8
FLOAT32_BAR = 4e-6


def finetune(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "lora_finetune.py"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def losses(output: str, run: str) -> list[list[float]]:
    """One list per model."""
    rows = re.findall(rf"^{run} +((?:\d+\.\d+ *)+)$", output, re.MULTILINE)
    return [[float(loss) for loss in row.split()] for row in rows]


def largest_differences(output: str) -> list[float]:
    return [float(found) for found in re.findall(r"^largest difference (\S+), at step", output, re.MULTILINE)]


def per_step(output: str, row: str) -> list[tuple[float, float]]:
    """(unpatched, patched), one pair per model."""
    pairs = re.findall(rf"^{row} +([\d,.]+)(?: MB)? +([\d,.]+)(?: MB)? ", output, re.MULTILINE)
    return [(float(before.replace(",", "")), float(after.replace(",", ""))) for before, after in pairs]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the demo prints, at a size that takes seconds, and the folder it writes."""
    folder = tmp_path_factory.mktemp("demo")
    done = finetune("--steps", 4, "--batch-size", 4, "--sequence-length", 40, "--output", folder)
    assert done.returncode == 0, done.stderr
    assert "4/16 steps" in done.stderr.replace("\r", "\n")  # the bar
    return done.stdout, folder


def test_both_models_are_patched_and_reported(demo: tuple[str, Path]) -> None:
    output, _ = demo
    assert "Qwen3.5, small, random weights: LoRA rank 8 on all linear layers, bfloat16, 4 steps" in output
    assert "Qwen3-MoE, small, random weights" in output
    for patch, layer in (("rms_norm", "Qwen3_5RMSNorm"), ("rms_norm", "Qwen3MoeRMSNorm"), ("swiglu", "Qwen3_5MLP")):
        row = re.search(rf"^(?:{patch})? +{layer} +\d+ +(\d+) ", output, re.MULTILINE)
        assert row and int(row[1]) > 0, f"{layer} did not run patched:\n{output}"
    assert not re.search(r"^\w* +failed: ", output, re.MULTILINE)


def test_the_loss_curves_agree_and_fall(demo: tuple[str, Path]) -> None:
    output, _ = demo
    unpatched, patched = losses(output, "unpatched"), losses(output, "patched")
    assert [len(curve) for curve in unpatched + patched] == [4] * 4
    for curve, apart in zip(unpatched, largest_differences(output), strict=True):
        assert curve[-1] < curve[0]
        assert 0 < apart < BFLOAT16_BAR * curve[0]


def test_the_patched_step_costs_less(demo: tuple[str, Path], simulated: None) -> None:
    output, _ = demo
    for row in ("kernel launches", "bytes moved", "peak memory"):
        pairs = per_step(output, row)
        assert len(pairs) == 2
        assert all(after < before for before, after in pairs), f"{row}: {pairs}"


def test_curves_and_adapters_are_saved(demo: tuple[str, Path]) -> None:
    output, folder = demo
    assert f"loss curves: {folder / 'loss_curves.png'}" in output
    assert (folder / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    for adapter in ("qwen3_5/unpatched", "qwen3_5/patched", "qwen3_moe/unpatched", "qwen3_moe/patched"):
        assert (folder / adapter / "adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as a user has it: a Qwen3 with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "own"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def own_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "own.txt"
    path.write_text("Füße und Käse, der Größe nach.\n" * 40, "utf-8")
    return path


def test_a_users_own_model_and_text_in_float32(own_model: Path, own_text: Path, tmp_path: Path) -> None:
    own = ("--model", own_model, "--text", own_text, "--dtype", "float32", "--gradient-checkpointing")
    done = finetune(*own, "--steps", 5, "--batch-size", 3, "--sequence-length", 32, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "own (Qwen3Config): LoRA rank 8 on all linear layers, float32, 5 steps of 3 x 32 tokens" in done.stdout
    assert re.search(r"^swiglu +Qwen3MLP +\d+ +[1-9]", done.stdout, re.MULTILINE), done.stdout
    (unpatched,), (largest,) = losses(done.stdout, "unpatched"), largest_differences(done.stdout)
    assert unpatched[-1] < unpatched[0]
    assert largest < FLOAT32_BAR * unpatched[0]
    assert (tmp_path / "own" / "patched" / "adapter_model.safetensors").is_file()


def test_one_run_only(own_model: Path, own_text: Path, tmp_path: Path) -> None:
    own = ("--model", own_model, "--text", own_text, "--only", "patched")
    done = finetune(*own, "--steps", 1, "--batch-size", 1, "--sequence-length", 16, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "unpatched" not in done.stdout
    assert ("kernel launches" in done.stdout) == simulator.is_active()


def refused(*arguments: object) -> str:
    """The error's last line."""
    done = finetune(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "steps [" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("argument", "value", "accepted"),
    [
        ("--model", "no/such/model", "one written by save_pretrained()"),
        ("--text", "no/such/text", "a text file in UTF-8"),
        ("--steps", "0", "a whole number, at least 1"),
        ("--steps", "many", "a whole number, at least 1"),
        ("--sequence-length", "1", "a whole number, at least 2"),
        ("--learning-rate", "-0.1", "a number above 0"),
        ("--only", "both", "'unpatched', 'patched'"),
        ("--device", "tpu", "'auto', 'npu', 'simulated'"),
    ],
)
def test_an_argument_that_is_none_is_refused(argument: str, value: str, accepted: str) -> None:
    error = refused(f"{argument}={value}")
    assert f"argument {argument}: " in error and f"'{value}'" in error and accepted in error


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "is empty"), (b" \n", "is empty"), (b"caf\xe9", "byte 3 is 0xe9")]
)
def test_a_text_that_is_none_is_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    error = refused("--text", path)
    assert f"argument --text: '{path}' " in error and reason in error and "UTF-8" in error


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("short", "utf-8")
    error = refused("--text", path, "--output", tmp_path / "out")
    assert f"argument --text: '{path}': 5 tokens are too few" in error and "needs at least 512" in error


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    assert f"argument --model: '{tmp_path}' has no readable config.json" in refused("--model", tmp_path)


def test_a_sequence_longer_than_the_model_accepts_is_refused(own_model: Path, tmp_path: Path) -> None:
    error = refused("--model", own_model, "--sequence-length", 65, "--output", tmp_path)
    assert "argument --sequence-length: '65': the model accepts at most 64" in error
