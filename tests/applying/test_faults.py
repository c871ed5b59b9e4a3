"""What can go wrong while patched: nothing stays half-patched, nothing is lost, and the error says what happened."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model, init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import find_executable_batch_size

import npu_patch
from tests.applying.test_lifecycle import snapshot
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.parity import NEAR
from tests.support.tiny_models import tiny, tiny_batch

ROOT = Path(__file__).parents[2]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert {name: e for name in expected if (e := relative_error(found[name], expected[name])) >= NEAR} == {}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


START = """
from npu_patch import simulator
if simulator.real_device() is None:
    simulator.start()
import sys, torch, npu_patch
from tests.support.tiny_models import tiny, tiny_batch
from tests.support.gradients import loss_and_gradients
"""


@pytest.mark.parametrize(
    "error", [RuntimeError("broken kernel"), torch.OutOfMemoryError("NPU out of memory")], ids=repr
)
@pytest.mark.parametrize("operator", ["npu_rms_norm", "npu_rotary_mul", "npu_swiglu", "npu_fusion_attention"])
def test_an_operator_that_raises_in_one_step_is_heard_and_harms_no_other(
    operator: str, error: Exception, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error arrives as it is: accelerate and Trainer look at the type of one that is about memory."""
    model = tiny("qwen3").to(npu)
    expected = loss_and_gradients(model, tiny_batch())
    before = snapshot(model)
    npu_patch.apply(model)
    genuine, calls = getattr(torch.ops.npu, operator), []

    def raises(*args: Any, **kwargs: Any) -> Any:
        calls.append(operator)
        if len(calls) == 2:
            raise error
        return genuine(*args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(type(error)) as raised:
        patched.setattr(torch.ops.npu, operator, raises)
        loss_and_gradients(model, tiny_batch())
    assert raised.value is error
    assert_same(loss_and_gradients(model, tiny_batch()), expected)
    npu_patch.restore()
    after = snapshot(model)
    assert [key for key in before if key[0] != "sys" and after[key] is not before[key]] == []


@pytest.mark.usefixtures("simulated")
def test_a_batch_that_does_not_fit_is_made_smaller_as_without_patches(npu: torch.device) -> None:
    """A real OutOfMemoryError of the allocator, in whatever runs when memory ends; accelerate tries a smaller batch."""
    model = tiny("qwen3", num_hidden_layers=4).to(npu)
    npu_patch.apply(model)
    expected = loss_and_gradients(model, tiny_batch(batch=2))
    model.zero_grad(set_to_none=True)
    total = torch.npu.get_device_properties(0).total_memory
    limit = torch.npu.memory_reserved() + (24 << 20)
    tried = []

    @find_executable_batch_size(starting_batch_size=64)
    def step(size: int) -> dict[str, torch.Tensor]:
        tried.append(size)
        loss_and_gradients(model, tiny_batch(batch=size, length=96))
        return loss_and_gradients(model, tiny_batch(batch=2))

    torch.npu.set_per_process_memory_fraction(limit / total)
    try:
        found = step()
    finally:
        torch.npu.set_per_process_memory_fraction(1.0)
    assert len(tried) > 1 and tried == sorted(set(tried), reverse=True)
    assert_same(found, expected)


def test_a_killed_training_resumes_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    script = str(ROOT / "tests" / "support" / "interrupted_training.py")
    whole = run_python(script, str(tmp_path / "whole"), "4", "-1")
    assert whole.returncode == 0, whole.stderr
    killed = run_python(script, str(tmp_path / "killed"), "4", "2")
    assert killed.returncode == -signal.SIGKILL
    resumed = run_python(script, str(tmp_path / "killed"), "4", "-1")
    assert resumed.returncode == 0, resumed.stderr
    assert killed.stdout + resumed.stdout == whole.stdout and len(whole.stdout.split()) == 8


def test_forwards_beside_threads_that_apply_and_restore(npu: torch.device) -> None:
    """Each forward sees each site patched or original, and both are right."""
    model = tiny("qwen3_moe").to(npu)
    ids = tiny_batch()["input_ids"].to(npu)
    with torch.no_grad():
        expected = model(input_ids=ids).logits.cpu()
    errors: list[BaseException] = []
    stop = threading.Event()

    def changes() -> None:
        try:
            while not stop.is_set():
                npu_patch.apply(model)
                npu_patch.restore()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=changes) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            with torch.no_grad():
                torch.testing.assert_close(model(input_ids=ids).logits.cpu(), expected, rtol=1e-4, atol=1e-5)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    npu_patch.restore()
    assert not errors and not npu_patch.report().outcomes


def in_child(body: Any) -> str:
    """What `body()` returns in a forked process, or the error there."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            answer = str(body())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return answer if status == 0 else f"status {status}"


@pytest.mark.parametrize("applied", ["in the parent", "in the worker", "in both"])
def test_a_forked_worker_uses_a_patched_model_on_cpu(applied: str, npu: torch.device) -> None:
    """As a DataLoader's worker does: an NPU cannot be used after a fork, its process must not mind the patches."""
    model = tiny("qwen3")
    expected = model(**tiny_batch()).loss.item()
    if applied != "in the worker":
        npu_patch.apply(model)

    def work() -> str:
        torch.set_num_threads(1)
        if applied != "in the parent":
            assert npu_patch.apply(model).patched
        loss = model(**tiny_batch()).loss.item()
        npu_patch.restore()
        assert not npu_patch.report().outcomes
        return str(abs(loss - expected) < 1e-6)

    assert in_child(work) == "True"
    assert bool(npu_patch.report().patched) == (applied != "in the worker")


def test_a_fork_waits_for_an_apply_in_another_thread(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the child would find some sites rebound, and a lock that nobody will release."""
    from npu_patch.patches import swiglu as swiglu_patch

    model = tiny("qwen3")
    inside, go_on = threading.Event(), threading.Event()
    genuine = swiglu_patch.read_swiglu

    def slow(*args: Any, **kwargs: Any) -> Any:
        inside.set()
        go_on.wait(30)
        return genuine(*args, **kwargs)

    monkeypatch.setattr(swiglu_patch, "read_swiglu", slow)
    thread = threading.Thread(target=npu_patch.apply, args=(model,))
    thread.start()
    assert inside.wait(30)
    threading.Timer(0.5, go_on.set).start()

    def work() -> str:
        found = {outcome.patch for outcome in npu_patch.report().patched}
        npu_patch.restore()
        return str({"rms_norm", "rope", "swiglu"} <= found)

    answer = in_child(work)
    thread.join(30)
    assert answer == "True"


def test_a_model_half_on_the_cpu_and_half_on_the_npu(npu: torch.device) -> None:
    model = tiny("qwen3")
    expected = loss_and_gradients(copy.deepcopy(model), tiny_batch())
    model.to(npu)
    for layer in (model.model.layers[1], model.model.norm):
        add_hook_to_module(layer.cpu(), AlignDevicesHook(execution_device="cpu", io_same_device=True))
    report = npu_patch.apply(model)
    found = loss_and_gradients(model, tiny_batch())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "npu"}
    assert_same(found, expected)
    for patch in ("rms_norm", "rope", "swiglu", "attention"):
        calls = [outcome.calls for outcome in report.patched if outcome.patch == patch]
        assert any(each.ran for each in calls) and any("input on cpu" in each.fell_through for each in calls), patch


def test_weights_offloaded_to_the_cpu_run_on_the_npu(npu: torch.device) -> None:
    model = tiny("qwen3")
    ids = tiny_batch()["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        device_map = {"model.embed_tokens": "npu:0", "model.rotary_emb": "npu:0", "model.layers.0": "npu:0"}
        device_map |= {"model.layers.1": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        dispatch_model(model, device_map=device_map, main_device="npu:0")
        report = npu_patch.apply(model)
        found = model(input_ids=ids).logits.cpu()
    assert relative_error(found, expected) < NEAR
    assert not any(outcome.calls.fell_through for outcome in report if outcome.patch in ("rms_norm", "rope"))
    assert {parameter.device.type for parameter in model.model.layers[1].parameters()} == {"meta"}


def test_a_meta_model_is_patched_filled_and_trained(npu: torch.device) -> None:
    real = tiny("qwen3")
    with init_empty_weights():
        model = tiny("qwen3")
    report = npu_patch.apply(model)
    with torch.no_grad():
        assert (
            model.to("meta")(input_ids=torch.zeros(1, 5, dtype=torch.long, device="meta")).logits.device.type == "meta"
        )
    model.load_state_dict(real.state_dict(), assign=True)
    model.model.rotary_emb = copy.deepcopy(real.model.rotary_emb)
    found = loss_and_gradients(model.to(npu), tiny_batch())
    assert {"rms_norm", "rope", "swiglu"} <= {outcome.patch for outcome in report.patched if outcome.calls.ran}
    npu_patch.restore()
    assert_same(found, loss_and_gradients(real.to(npu), tiny_batch()))


@pytest.mark.parametrize("written", ["patched", "made while patched", "unpatched"])
def test_a_pickled_model_goes_between_patched_and_unpatched_processes(written: str, tmp_path: Path) -> None:
    if written == "made while patched":
        npu_patch.apply()
    model = tiny("qwen3")
    expected = loss_and_gradients(model, tiny_batch())["loss"].item()
    if written == "patched":
        npu_patch.apply(model)
    content = pickle.dumps(copy.deepcopy(model))
    assert b"npu_patch" not in content
    (tmp_path / "model").write_bytes(content)
    apply = "npu_patch.apply(strict=True)" if written == "unpatched" else ""
    done = run_python(
        "-c",
        f"{START}{apply}\nimport pickle\nmodel = pickle.load(open({str(tmp_path / 'model')!r}, 'rb'))\n"
        "print(loss_and_gradients(model.to('npu'), tiny_batch())['loss'].item())\n"
        "print(sum(outcome.calls.ran for outcome in npu_patch.report()))",
    )
    assert done.returncode == 0, done.stderr
    loss, ran = done.stdout.split()[-2:]
    assert abs(float(loss) - expected) < 1e-5
    assert (int(ran) > 0) == (written == "unpatched")


def test_an_interpreter_ends_while_patched_as_it_would_otherwise() -> None:
    script = f"""{START}
import atexit
def late():
    import transformers.models.granite.modeling_granite
model = tiny("qwen3").to("npu")
npu_patch.apply()
atexit.register(late)
with npu_patch.applied(model):
    loss_and_gradients(model, tiny_batch())
    sys.exit(3)
"""
    done = run_python("-c", script)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
