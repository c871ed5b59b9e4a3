"""Puts the simulated kernels under torch_npu's dispatcher."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from .cann import CHECKER


def install(import_torch: Callable[[], None] | None, checker: Path | None) -> None:
    """Import torch and torch_npu on the CANN stub and register every kernel. Called once, by `start()`.

    `import_torch` executes a torch that is being imported already. `checker`: the folder of the stub's libraries, if
    torch_npu's allocator shall report to them.
    """
    with warnings.catch_warnings():
        # Overriding a kernel of torch_npu's is what happens here, about 1500 times.
        warnings.filterwarnings("ignore", message=".*[Oo]verriding a previously registered kernel.*")
        # torch_npu prints that ASCEND_HOME_PATH is not set, which is the point here.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            if import_torch is not None:
                import_torch()
            import torch
            import torch_npu  # torch loads it already, unless TORCH_DEVICE_BACKEND_AUTOLOAD=0

        torch.get_device_module("npu").init()
        # torch.npu.set_task_queue_enable() has no effect: a queue's thread would race with kernels that run at once.
        torch_npu._C._npu_set_task_queue_enable = lambda mode: None
        if checker is not None:
            with _memory_checker(checker):
                torch.empty(1, device="npu")  # the allocator asks once
        from . import aten, format_cast, fused, graphs, missing

        graphs.install()
        aten.register()
        fused.register()
        format_cast.register()
        missing.register(name for family in fused.FAMILIES for name in family.KERNELS)


@contextlib.contextmanager
def _memory_checker(folder: Path) -> Iterator[None]:
    """What tells torch_npu's allocator that a memory checker was preloaded, within the block."""
    said = {"LD_PRELOAD": str(folder / CHECKER), "ASCEND_HOME_PATH": str(folder)}
    before = {name: os.environ.get(name) for name in said}
    os.environ.update(said)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
