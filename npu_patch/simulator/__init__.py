"""An Ascend NPU on host memory, for the genuine torch_npu.

    from npu_patch import simulator
    simulator.start()                      # before anything imports torch
    import torch
    torch.ones(3, device="npu:0") + 1      # torch_npu's dispatcher, allocator and autograd; kernels on the CPU

    with simulator.count() as counted:     # kernel launches and bytes moved
        model(**batch).loss.backward()
    print(counted)

`python -m npu_patch.simulator train.py ARGS...` runs a script that way, `python -m npu_patch.simulator torchrun
--nproc-per-node 2 train.py` two ranks, each with an NPU of its own and HCCL between them. Aten operators run on the
CPU, over the very memory of the npu tensors, and graphs (`torch.npu.NPUGraph`) record and replay them; fused operators
run a reference written from their documentation, and refuse what it does not allow (`Refused`). Speed means nothing
here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import Refused, SimulatorError

if TYPE_CHECKING:
    from .counters import Counted, count
    from .wrong import wrong_operator

__all__ = ["Counted", "Refused", "SimulatorError", "count", "is_active", "real_device", "start", "wrong_operator"]

POISON = "NPU_PATCH_SIMULATOR_POISON"

_active = False


def start(
    *,
    devices: int | None = None,
    any_version: bool = False,
    replace_real: bool = False,
    poison: bool | None = None,
    children: bool = True,
    import_torch: Callable[[], None] | None = None,
) -> None:
    """Give this process simulated NPUs `npu:0` ... and import torch and torch_npu. A second call does nothing.

    `devices`: how many NPUs, 1 to 16 (default: one for each rank that torchrun or accelerate launch started here, else
    1; the ranks communicate by HCCL). `any_version`: accept a torch_npu that the simulator was not tested with.
    `replace_real`: go ahead on a machine that has a real CANN or NPU. `poison`: fresh and freed device memory holds NaN
    (default: what the environment variable NPU_PATCH_SIMULATOR_POISON says, 1 or 0). `children`: the processes that
    this one starts have the same NPUs once they import torch. `import_torch`: for the hook in those processes.

    Call it before anything imports torch. Errors: `SimulatorError` for a torch or torch_npu that is imported already,
    a torch_npu that is missing or untested, a missing C compiler, a real CANN or NPU.
    """
    global _active
    if _active:
        return
    from . import cann, inherit

    if poison is None:
        poison = _poison_by_environment()
    inherit.stop_waiting_for_torch()
    checker = cann.load(devices, any_version, replace_real, poison, torch_may_be_there=import_torch is not None)
    os.environ["TASK_QUEUE_ENABLE"] = "0"  # before torch_npu reads it: kernels run and fail within the call
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: Triton kernels run in no other way
    options = {"devices": devices, "any_version": any_version, "replace_real": replace_real, "poison": poison}
    inherit.let_children_simulate(options if children else None)
    from . import device

    _active = True  # what torch loads may ask
    try:
        device.install(import_torch, checker if poison else None)
    except BaseException:
        _active = False
        raise


def _poison_by_environment() -> bool:
    value = os.environ.get(POISON, "0")
    if value not in ("0", "1"):
        raise SimulatorError(f"{POISON}={value!r}: it must be 1 (device memory nobody wrote is NaN) or 0")
    return value == "1"


def is_active() -> bool:
    """Whether this process runs on the simulated NPU."""
    return _active


def real_device() -> str | None:
    """The sign of a real CANN or NPU on this machine, in words ("/dev/davinci0 exists"), or None."""
    from . import cann

    return cann.real_device()


def __getattr__(name: str) -> object:
    if name in ("count", "Counted"):  # they need no torch, but nobody needs them before start()
        from . import counters

        return getattr(counters, name)
    if name == "wrong_operator":
        from .wrong import wrong_operator

        return wrong_operator
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
