"""Puts the simulated kernels under torch_npu's dispatcher."""

import contextlib
import os
import warnings


def install() -> None:
    """Import torch and torch_npu on the CANN stub and register every kernel. Called once, by `start()`."""
    with warnings.catch_warnings():
        # Overriding a kernel of torch_npu's is what happens here, about 1100 times.
        warnings.filterwarnings("ignore", message=".*[Oo]verriding a previously registered kernel.*")
        # torch_npu prints that ASCEND_HOME_PATH is not set, which is the point here.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            import torch
            import torch_npu  # noqa: F401  torch loads it already, unless TORCH_DEVICE_BACKEND_AUTOLOAD=0

        torch.npu.init()
        from . import aten, fused

        aten.register()
        fused.register()
