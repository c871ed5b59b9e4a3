"""Starts the simulated NPU before any test imports torch, unless this machine has a real one."""

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["COLUMNS"] = "120"  # of the tables that commands print, whatever the terminal of the tests has

from npu_patch import simulator

if simulator.real_device() is None:
    simulator.start()

import pytest
import torch

import npu_patch
from npu_patch.kernels import launch

# Two processes of pytest-xdist whose threads wait for each other's cores are slower than two that have one each.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-first-steps", action="store_true", help="every combination in test_observation_apart.py")
    parser.addoption("--all-vision", action="store_true", help="every combination in test_vision_parity.py")


@pytest.fixture(scope="session")
def npu() -> torch.device:
    """The NPU, real or simulated."""
    return torch.device("npu:0")


@pytest.fixture(autouse=True)
def nothing_left_applied() -> Iterator[None]:
    """Set up before the fixtures of a test and taken down after them."""
    yield
    npu_patch.restore()


@pytest.fixture
def leaving_nothing_applied(nothing_left_applied: None) -> Iterator[None]:
    """For what has to restore by itself."""
    yield
    assert not npu_patch.report().outcomes


@pytest.fixture
def simulated() -> None:
    """Skips a test of the simulator itself on a real NPU."""
    if not simulator.is_active():
        pytest.skip("a real NPU is present")


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """For Triton kernels in the interpreter, which runs programs one by one: any number of them computes the same."""
    monkeypatch.setattr(launch, "machine_of", lambda device: launch.Machine("npu", 2, launch.UNIFIED_BUFFER, True))
