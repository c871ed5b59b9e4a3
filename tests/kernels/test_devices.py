"""The kernels on the simulated NPU, and what importing the package does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from npu_patch.kernels import launch
from npu_patch.kernels.qk_norm_rope import QKNorm, qk_norm_rope
from npu_patch.kernels.rms_norm import add_rms_norm
from npu_patch.kernels.swiglu import swiglu
from tests.kernels.exactness import normal


def test_as_on_the_cpu(npu: torch.device) -> None:
    tables = normal(1, 3, 16), normal(1, 3, 16, seed=2)
    cases = (
        (swiglu, (normal(3, 40), normal(3, 40, seed=2))),
        (lambda x, r, w: add_rms_norm(x, r, w, 1e-6)[0], (normal(3, 40), normal(3, 40, seed=2), normal(40))),
        (
            lambda q, k, a, b: qk_norm_rope(q, k, a, b, *(t.to(q.device) for t in tables), QKNorm())[0],
            (normal(2, 3, 4, 16), normal(2, 3, 2, 16), normal(16), normal(16, seed=2)),
        ),
    )
    for function, inputs in cases:
        here, there = ([x.detach().to(d).requires_grad_() for x in inputs] for d in ("cpu", npu))
        y, z = function(*here), function(*there)
        assert z.device == npu
        torch.testing.assert_close(z.cpu(), y, rtol=1e-6, atol=1e-6)
        wanted = torch.autograd.grad(y.square().sum(), here, allow_unused=True)
        got = torch.autograd.grad(z.square().sum(), there, allow_unused=True)
        for a, b in zip(got, wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)


def test_cores_are_asked_for(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that has 17."""
    monkeypatch.setattr(torch.npu, "get_device_properties", lambda device: SimpleNamespace(vector_core_num=17))
    launch.machine_of.cache_clear()
    try:
        assert launch.machine_of(npu).cores == 17
    finally:
        launch.machine_of.cache_clear()


def test_the_package_imports_without_triton() -> None:
    code = "import sys, npu_patch.kernels.launch; assert 'triton' not in sys.modules, 'triton was imported'"
    env = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # no CANN here for torch_npu to load
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
