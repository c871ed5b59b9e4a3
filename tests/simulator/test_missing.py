"""What the simulator lacks raises by name, every time; nothing is returned that nobody wrote."""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_npu

from npu_patch.simulator import Refused, cann, fused, missing

pytestmark = pytest.mark.usefixtures("simulated")

MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode,
}  # fmt: skip


def operator(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.npu, packet), overload or "default")


def lacking() -> list[str]:
    """Those that compute: without a tensor among its arguments an operator sets an option of the runtime."""
    names = missing.missing(name for family in fused.FAMILIES for name in family.KERNELS)
    return [name for name in names if any("Tensor" in str(a.type) for a in operator(name)._schema.arguments)]


def value(kind: str, shape: tuple[int, ...], dtype: torch.dtype, needs_grad: bool) -> Any:
    """Something of a type of a schema, as the schema spells it."""
    kind = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional[") else kind
    if kind == "Tensor":
        return torch.ones(shape, device="npu").to(dtype).requires_grad_(needs_grad and dtype.is_floating_point)
    if kind in ("List[Tensor]", "List[Optional[Tensor]]"):
        return [value("Tensor", shape, dtype, needs_grad)] * 2
    return {
        "List[int]": [1] * len(shape), "List[float]": [0.5], "List[bool]": [True] * 3, "int": 1, "float": 0.5,
        "bool": True, "str": "BNSD", "number": 1, "Device": torch.device("npu"),
    }.get(kind)  # fmt: skip


def calls(name: str, needs_grad: bool) -> Iterator[Callable[[], Any]]:
    """Calls with every argument given, as plain as the schema allows: in place, `out=`, and with gradients."""
    arguments = operator(name)._schema.arguments
    needs_grad = needs_grad and not any(a.alias_info is not None and a.alias_info.is_write for a in arguments)
    for shape in [(4, 8), (2, 4, 8, 8)]:
        for dtype in (torch.float32, torch.float16, torch.int32):
            values = {a.name: value(str(a.type), shape, dtype, needs_grad) for a in arguments}
            args = [values[a.name] for a in arguments if not a.kwarg_only]
            kwargs = {a.name: values[a.name] for a in arguments if a.kwarg_only}
            yield lambda args=args, kwargs=kwargs: operator(name)(*args, **kwargs)


@pytest.mark.parametrize("mode", MODES)
def test_every_operator_that_is_not_emulated_raises_by_name_every_time(mode: str, npu: torch.device) -> None:
    """Where arguments require gradients, torch_npu's derivative may refuse them first; it says for which operator."""
    names = lacking()
    assert len(names) > 150
    wrong = {}
    for name in names:
        refusals = 0
        with MODES[mode]():
            for call in calls(name, mode == "grad"):
                for _ in range(3):
                    try:
                        wrong[name] = f"returned {type(call())}"
                    except RuntimeError as error:
                        refusals += isinstance(error, Refused)
                        if name.partition(".")[0] not in str(error):
                            wrong[name] = str(error)
        if not refusals and mode != "grad":
            wrong.setdefault(name, "never reached")
    assert not wrong
    assert (torch.ones(3, device=npu) + 1).tolist() == [2, 2, 2]


def test_what_torch_npu_launches_below_the_dispatcher_is_an_error() -> None:
    """Old-style operators are all executed by these two; new-style ones are not found in libopapi.so."""
    stub = ctypes.CDLL("libascendcl.so")
    stub.aclGetRecentErrMsg.restype = ctypes.c_char_p
    for execute in (stub.aclopCompileAndExecute, stub.aclopCompileAndExecuteV2):
        assert execute(b"Mish") != 0
        assert b"Mish" in stub.aclGetRecentErrMsg()
    assert not any(hasattr(library, "aclnnMish") for library in cann._loaded)


def test_the_task_queue_stays_off(npu: torch.device) -> None:
    torch.npu.set_task_queue_enable(2)
    assert torch.npu.get_task_queue_enable() == 0


def test_storages_that_grow_keep_what_they_hold(npu: torch.device) -> None:
    wrong = 0
    for i in range(500):
        x = torch.arange(12.0, device=npu) + i
        expected, storage = x.tolist(), x.untyped_storage()
        storage.resize_(4096 + 4 * i)
        wrong += torch.empty(0, device=npu).set_(storage, 0, (12,), (1,)).tolist() != expected
    assert wrong == 0


def test_torch_npus_own_kernels_that_stay_compute(npu: torch.device) -> None:
    x = torch.randn(4, 8, device=npu)
    assert torch.equal(torch_npu.npu_format_cast(x, 2), x)
    assert torch.equal(torch_npu.npu_format_cast(x, 29), x)  # internal formats are not allowed: it stays ND
    assert torch.equal(torch_npu.npu_format_cast_(x.clone(), 2), x)
    assert torch.equal(torch.ops.npu.npu_reshape(x, [8, 4]), x.view(8, 4))
    assert torch.equal(torch.ops.npu.copy_memory_(torch.empty_like(x), x), x)
    assert (torch_npu.get_npu_format(x), torch_npu.get_storage_size(x)) == (2, 32)
    index = torch.tensor([[1, 0]], device=npu)
    scattered = torch.ops.npu.npu_gather_backward(x[:1, :2], [4, 8], 1, index, False)
    assert torch.equal(scattered, torch.zeros_like(x).scatter_add(1, index, x[:1, :2]))


def test_sparse_tensors_are_refused_by_name(npu: torch.device) -> None:
    with pytest.raises(Refused, match=r"_to_sparse: .* torch.sparse_coo tensors"):
        torch.eye(3, device=npu).to_sparse()
    coo = torch.eye(3).to_sparse()
    with pytest.raises(RuntimeError):
        torch.sparse.mm(torch.sparse_coo_tensor(coo.indices(), coo.values(), device=npu), torch.ones(3, 3, device=npu))
