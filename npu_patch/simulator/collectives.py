"""Calls of HCCL and what this rank sent by them, as hccl/ counts them in libhccl.so."""

from __future__ import annotations

import ctypes

from . import cann

# The order of the calls in hccl/hccl.h.
NAMES = (
    "HcclAllReduce", "HcclReduce", "HcclAllGather", "HcclReduceScatter", "HcclBroadcast", "HcclScatter", "HcclAlltoAll",
    "HcclSend", "HcclRecv", "HcclBarrier", "HcclAllGatherV", "HcclReduceScatterV",
)  # fmt: skip

Totals = dict[str, tuple[int, int]]


def totals() -> Totals:
    """Name of a call -> (times, bytes sent to other ranks), since this process started; empty on a real NPU."""
    if not cann.is_loaded():
        return {}
    library = ctypes.CDLL("libhccl.so")  # the one that is loaded
    table = (ctypes.c_uint64 * (2 * len(NAMES))).in_dll(library, "simulator_hccl_counted")
    return {name: (table[2 * i], table[2 * i + 1]) for i, name in enumerate(NAMES)}


def since(before: Totals) -> Totals:
    """What was called since then."""
    grown = {name: (calls - before[name][0], sent - before[name][1]) for name, (calls, sent) in totals().items()}
    return {name: each for name, each in grown.items() if each[0]}
