"""Lengths on the host of a captured attention: as at the capture, or updated once for each replay."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

from npu_patch import simulator
from npu_patch.simulator import Refused
from tests.simulator.test_graphs import launches
from tests.support.torch_npu_operators import needs_operator

pytestmark = [
    pytest.mark.usefixtures("simulated"),
    needs_operator("_npu_fused_infer_attention_score_infer_output"),
    needs_operator("_npu_fused_infer_attention_score_v2_infer_output"),
]

HEADS, KEY_HEADS, KEYS, WIDTH = 4, 2, 32, 16
V1 = {"num_heads": HEADS, "num_key_value_heads": KEY_HEADS, "scale": 0.25}
V2 = {"num_query_heads": HEADS, "num_key_value_heads": KEY_HEADS, "softmax_scale": 0.25}
VERSIONS = [
    pytest.param("npu_fused_infer_attention_score", "actual_seq_lengths_kv", V1, "softmax_lse_flag", id="v1"),
    pytest.param("npu_fused_infer_attention_score_v2", "actual_seq_kvlen", V2, "return_softmax_lse", id="v2"),
]


def tensors(layout: str = "BNSD") -> tuple[Tensor, Tensor, Tensor]:
    shapes = {"BNSD": [(2, HEADS, 1, WIDTH), (2, KEY_HEADS, KEYS, WIDTH)]}
    shapes["BNSD_BSND"] = shapes["BNSD"]
    shapes["BSH"] = [(2, 1, HEADS * WIDTH), (2, KEYS, KEY_HEADS * WIDTH)]
    shapes["BSND"] = [(2, 1, HEADS, WIDTH), (2, KEYS, KEY_HEADS, WIDTH)]
    generator = torch.Generator().manual_seed(0)
    query, keys = shapes[layout]
    return tuple(torch.randn(shape, generator=generator).bfloat16().to("npu:0") for shape in (query, keys, keys))


def attend(operator: str, q: Tensor, k: Tensor, v: Tensor, layout: str = "BNSD", **options: Any) -> Any:
    return getattr(torch_npu, operator)(q, k, v, input_layout=layout, **options)


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=[True, False], ids=["updated first", "replayed first"])
def update_first(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def left_stopped() -> Iterator[list[torch.npu.NPUGraph]]:
    """Graphs that wait at an event: the test's end lets them go."""
    graphs: list[torch.npu.NPUGraph] = []
    yield graphs
    for graph in graphs:
        graph.reset()
    torch.npu.synchronize()


@pytest.mark.parametrize(("operator", "lengths", "options", "lse"), VERSIONS)
@pytest.mark.parametrize("layout", ["BNSD", "BNSD_BSND", "BSH", "BSND"])
def test_a_replay_takes_the_lengths_of_its_update(
    operator: str, lengths: str, options: dict[str, Any], lse: str, layout: str, update_first: bool
) -> None:
    q, k, v = tensors(layout)
    options = {**options, lse: True, "layout": layout}
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        first = attend(operator, q, k, v, **options, **{lengths: [5, 7]})
        second = attend(operator, q * 2, k, v, **options, **{lengths: [5, 7]})
    for step in range(20):
        q.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(step)))
        now = [6 + step, 8 + step]
        order = [lambda: graph.update(cpu_update_input=[{lengths: now}]), graph.replay]  # noqa: B023
        for call in order if update_first else reversed(order):
            call()
        for got, query in ((first, q), (second, q * 2)):
            for mine, eager in zip(got, attend(operator, query, k, v, **options, **{lengths: now}), strict=True):
                assert torch.equal(mine, eager)


def test_without_dispatching_the_lengths_stay_those_of_the_capture() -> None:
    q, k, v = tensors()
    graph = torch.npu.NPUGraph()
    lengths = [5, 7]
    with torch.npu.graph(graph):
        result = attend("npu_fused_infer_attention_score", q, k, v, **V1, actual_seq_lengths_kv=lengths)[0]
    lengths[:] = [9, 12]
    graph.replay()
    kept = attend("npu_fused_infer_attention_score", q, k, v, **V1, actual_seq_lengths_kv=[5, 7])[0]
    assert torch.equal(result, kept)


@pytest.mark.parametrize("use", ["wait", "read", "launch", "replay"])
def test_a_replay_without_its_update_is_waited_for_in_vain(use: str, left_stopped: list[Any]) -> None:
    q, k, v = tensors()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        result = attend("npu_fused_infer_attention_score", q, k, v, **V1, actual_seq_lengths_kv=[5, 7])[0]
    left_stopped.append(graph)
    calls = {
        "wait": torch.npu.synchronize,
        "read": result.sum,
        "launch": lambda: q + 1,
        "replay": graph.replay,
    }
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [9, 12]}])
    graph.replay()  # an update serves one replay
    graph.replay()
    with pytest.raises(RuntimeError, match=r"nobody recorded: the device would never finish. Call NPUGraph.update\(\)"):
        calls[use]()
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [3, 4]}])
    calls[use]() if use != "replay" else None
    assert torch.equal(
        result, attend("npu_fused_infer_attention_score", q, k, v, **V1, actual_seq_lengths_kv=[3, 4])[0]
    )


def test_an_update_that_no_replay_takes_ends_with_its_graph() -> None:
    from npu_patch.simulator import graphs

    q, k, v = tensors()
    graph, before = torch.npu.NPUGraph(), set(graphs._recorded)
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        attend("npu_fused_infer_attention_score", q, k, v, **V1, actual_seq_lengths_kv=[5, 7])
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [9, 12]}])
    assert graphs._recorded > before
    graph.reset()  # a later graph's event may have the address
    assert graphs._recorded == before


def test_lengths_that_the_operator_does_not_take_are_an_error_of_the_replay(left_stopped: list[Any]) -> None:
    q, k, v = tensors()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=True):
        attend("npu_fused_infer_attention_score", q, k, v, **V1, actual_seq_lengths_kv=[5, 7])
    left_stopped.append(graph)
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [5, KEYS + 1]}])
    with pytest.raises(RuntimeError, match="actual_seq_lengths_kv must be one length of at most 32 for each entry"):
        graph.replay()


def test_an_update_counts_no_launch_and_its_companions_neither() -> None:
    q, k, v = tensors()
    graph = torch.npu.NPUGraph()
    with simulator.count() as counted, torch.npu.graph(graph, auto_dispatch_capture=True):
        attend("npu_fused_infer_attention_score", q, k, v, **V1, actual_seq_lengths_kv=[5, 7])
    assert launches(counted) == 0
    with simulator.count() as counted:
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [9, 12]}])
        graph.replay()
    assert (launches(counted), counted.replayed) == (1, 1)
    with simulator.count() as eager:
        attend("npu_fused_infer_attention_score", q, k, v, **V1, actual_seq_lengths_kv=[9, 12])
    unasked = 4  # bytes of the lse, of one element
    assert counted.replayed_by_op == {name: (n, moved + unasked) for name, (n, moved) in eager.by_op.items()}


def test_another_operator_cannot_take_the_place_of_an_updated_one() -> None:
    q, k, v = tensors()
    graph, stream = torch.npu.NPUGraph(), torch.npu.Stream()
    with torch.npu.graph(graph):
        torch.npu.graph_task_group_begin(torch.npu.current_stream())
        attend("npu_fused_infer_attention_score", q, k, v, **V1)
        group = torch.npu.graph_task_group_end(torch.npu.current_stream())
    with torch.npu.stream(stream):
        torch.npu.graph_task_update_begin(stream, group)
        with pytest.raises(Refused, match="aten::mul: the task group that is being updated has npu::npu_fused_infer"):
            q * 2
        with pytest.raises(RuntimeError, match="0 of 1 kernels of the task group were updated"):
            torch.npu.graph_task_update_end(stream)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"out": 1}, r"out must be \[attention, lse\], not 1 tensors"),
        (
            {"shape": (2, HEADS, 2, WIDTH)},
            r"out's attention must be \[2, 4, 1, 16\] in torch.bfloat16, not \[2, 4, 2, 16\]",
        ),
        ({"workspace": 3}, "workspace must have the 1024 bytes that were asked for, not 6"),
    ],
)
def test_given_tensors_and_workspace_must_fit(change: dict[str, Any], sentence: str) -> None:
    q, k, v = tensors()
    out, lse = torch_npu._npu_fused_infer_attention_score_infer_output(q, v, **{
        "input_layout": "BNSD", "num_heads": HEADS, "num_key_value_heads": KEY_HEADS,
    })  # fmt: skip
    workspace = torch_npu._npu_fused_infer_attention_score_get_max_workspace(q, k, v, input_layout="BNSD", **V1)
    if "shape" in change:
        out = q.new_empty(change["shape"])
    outs = [out, lse][: change.get("out", 2)]
    with pytest.raises(Refused, match=sentence):
        torch_npu.npu_fused_infer_attention_score.out(
            q, k, v, workspace=workspace[: change.get("workspace")], out=outs, input_layout="BNSD", **V1
        )
