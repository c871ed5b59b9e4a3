"""The stub's libhccl.so, libhcomm.so and libopapi.so, asked directly: what torch_npu finds there, what they refuse."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests.support.torch_npu_operators import ends_failed_captures

pytestmark = pytest.mark.usefixtures("simulated")

# torch_npu 2.9 is linked against these (readelf), 2.13 looks these and the others up by name.
LINKED = (
    "HcclAllGather", "HcclAllReduce", "HcclBroadcast", "HcclReduceScatter", "HcclSend", "HcclRecv", "HcclGetRootInfo",
    "HcclCommInitAll", "HcclCommInitRootInfo", "HcclCommDestroy",
)  # fmt: skip
LOOKED_UP = (
    "HcclCommInitRootInfoConfig", "HcclGetCommConfigCapability", "HcclGetCommName", "HcclGetCommAsyncError",
    "HcclReduce", "HcclScatter", "HcclAlltoAll", "HcclAlltoAllV", "HcclAlltoAllVC", "HcclBatchSendRecv",
    "HcclAllGatherV", "HcclReduceScatterV",
)  # fmt: skip


def said() -> str:
    message = ctypes.CDLL("libascendcl.so").aclGetRecentErrMsg
    message.restype = ctypes.c_char_p
    return message().decode()


@pytest.mark.parametrize(
    ("library", "names"),
    [("libhccl.so", LINKED), ("libhccl.so", LOOKED_UP), ("libhcomm.so", ("HcclGroupStart", "HcclGroupEnd"))],
)
def test_torch_npu_finds_its_functions(library: str, names: tuple[str, ...]) -> None:
    loaded = ctypes.CDLL(library)
    assert [name for name in names if not hasattr(loaded, name)] == []


def test_ranks_of_another_machine_are_refused() -> None:
    hccl, communicator = ctypes.CDLL("libhccl.so"), ctypes.c_void_p()
    root_info = ctypes.create_string_buffer(4108)
    assert hccl.HcclGetRootInfo(root_info) == 0
    root_info[33:36] = b"xyz"
    assert hccl.HcclCommInitRootInfo(2, root_info, 1, ctypes.byref(communicator)) == 5
    assert "only ranks of one machine and network namespace are simulated" in said()
    assert hccl.HcclCommInitAll(2, None, ctypes.byref(communicator)) == 5
    assert "several devices in one process are not simulated" in said()


@ends_failed_captures
def test_communication_in_a_captured_graph_is_refused() -> None:
    hccl, communicator = ctypes.CDLL("libhccl.so"), ctypes.c_void_p()
    root_info = ctypes.create_string_buffer(4108)
    assert hccl.HcclGetRootInfo(root_info) == 0
    assert hccl.HcclCommInitRootInfo(1, root_info, 0, ctypes.byref(communicator)) == 0
    graph, stream = torch.npu.NPUGraph(), torch.npu.Stream()
    invalid = pytest.raises(RuntimeError, match="the capture is invalid: communication within a captured graph is not")
    with invalid, torch.npu.graph(graph, stream=stream):
        assert hccl.HcclBarrier(communicator, ctypes.c_void_p(stream.npu_stream)) == 5
        assert said() == "HcclBarrier: communication within a captured graph is not simulated"
    assert hccl.HcclBarrier(communicator, ctypes.c_void_p(stream.npu_stream)) == 0
    assert hccl.HcclCommDestroy(communicator) == 0


@pytest.mark.parametrize(("value", "code"), [(0.0, 0), (1.0, 207000)])
def test_a_gathered_tensor_is_padded_with_zeros_only(value: float, code: int) -> None:
    opapi = ctypes.CDLL("libopapi.so")
    for name in ("aclCreateTensor", "aclCreateIntArray", "aclCreateScalar"):
        getattr(opapi, name).restype = ctypes.c_void_p
    float32 = 0

    def tensor(*values: float) -> tuple[ctypes.c_void_p, ctypes.Array[ctypes.c_float]]:
        data, size, stride = (ctypes.c_float * len(values))(*values), ctypes.c_int64(len(values)), ctypes.c_int64(1)
        made = opapi.aclCreateTensor(
            ctypes.byref(size), ctypes.c_uint64(1), float32, ctypes.byref(stride), ctypes.c_int64(0), 2, None,
            ctypes.c_uint64(0), data,
        )  # fmt: skip
        return ctypes.c_void_p(made), data

    (given, _), (padded, out) = tensor(3.0, 4.0), tensor(*[9.0] * 5)
    pad = ctypes.c_void_p(opapi.aclCreateIntArray((ctypes.c_int64 * 2)(1, 2), ctypes.c_uint64(2)))
    scalar = ctypes.c_void_p(opapi.aclCreateScalar(ctypes.byref(ctypes.c_float(value)), float32))
    workspace, executor = ctypes.c_uint64(), ctypes.c_void_p()
    found = opapi.aclnnConstantPadNdGetWorkspaceSize(
        given, pad, scalar, padded, ctypes.byref(workspace), ctypes.byref(executor)
    )
    assert found == code
    if code:
        assert "only padding of known dtypes with 0 is simulated" in said()
    else:
        assert opapi.aclnnConstantPadNd(None, ctypes.c_uint64(0), executor, None) == 0
        assert list(out) == [0, 3, 4, 0, 0]
