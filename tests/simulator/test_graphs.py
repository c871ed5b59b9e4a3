"""torch_npu's own graphs on the simulated NPU: captured once, replayed over inputs whose contents have changed."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch_npu
from torch import Tensor

from npu_patch import simulator
from tests.support.needs_triton import needs_triton

pytestmark = pytest.mark.usefixtures("simulated")

REPLAYS = 20


def captured(step: Callable[[], Tensor], **options: object) -> tuple[torch.npu.NPUGraph, Tensor]:
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, **options):
        result = step()
    return graph, result


def launches(counted: simulator.Counted) -> int:
    """Without those by which torch_npu 2.9 sets its generator's state on the device before each capture and replay."""
    return counted.launches - counted.by_op.get("aten::fill_", (0, 0))[0]


@pytest.fixture
def x(npu: torch.device) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(npu)


@pytest.fixture
def weight(npu: torch.device) -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).to(npu)


@pytest.fixture
def side() -> Iterator[torch.npu.Stream]:
    stream = torch.npu.Stream()
    yield stream
    assert not torch.npu.is_current_stream_capturing()


def fused_step(x: Tensor, weight: Tensor) -> Tensor:
    hidden = torch_npu.npu_rms_norm((x @ weight).relu() + 1, torch.ones_like(weight[0]), 1e-6)[0]
    return torch_npu.npu_swiglu(hidden, -1).mT[1:]  # a view of the result


def test_a_replay_computes_what_eager_does_from_the_inputs_contents_of_then(x: Tensor, weight: Tensor) -> None:
    graph, result = captured(lambda: fused_step(x, weight))
    for seed in range(REPLAYS):
        x.copy_(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(result, fused_step(x, weight))


@needs_triton
def test_triton_kernels_are_replayed_too(x: Tensor, weight: Tensor) -> None:
    from npu_patch.kernels.rms_norm import add_rms_norm

    residual = torch.zeros_like(x)
    graph, results = captured(lambda: add_rms_norm(x, residual, weight[0], 1e-6))
    for seed in range(3):
        x.copy_(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)))
        residual.copy_(x * seed)
        with simulator.count() as counted:
            graph.replay()
        assert any(name.startswith("triton::rms_norm") for name in counted.replayed_by_op)
        for got, eager in zip(results, add_rms_norm(x, residual, weight[0], 1e-6), strict=True):
            assert torch.equal(got, eager)


def test_a_capture_computes_nothing(x: Tensor) -> None:
    total, before = torch.zeros_like(x), x.clone()
    graph, result = captured(lambda: total.add_(x.mul_(2)) + 1)
    assert torch.equal(x, before) and not total.any() and result.isnan().all()
    graph.replay()
    assert torch.equal(total, 2 * before) and torch.equal(result, total + 1)


def test_a_graph_holds_addresses_and_not_tensors(x: Tensor) -> None:
    inputs = [torch.zeros_like(x)]
    graph, result = captured(lambda: inputs[0] + 1)
    address = inputs[0].data_ptr()
    inputs.clear()
    taken = torch.full_like(x, 7.0)
    assert taken.data_ptr() == address  # the allocator has given the block away
    graph.replay()
    assert bool((result == 8).all())


def test_gradients_are_captured_too(npu: torch.device) -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
    on_device = torch.nn.Sequential(*layers).to(npu)
    wanted = [parameter.detach().clone() for parameter in on_device.parameters()]
    graphed = torch.npu.make_graphed_callables(on_device, (torch.randn(4, 8, device=npu, requires_grad=True),))
    for seed in range(3):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).to(npu).requires_grad_()
        graphed(x).square().sum().backward()
        got = [x.grad, *(parameter.grad.clone() for parameter in on_device.parameters())]
        eager = x.detach().clone().requires_grad_()
        leaves = [parameter.clone().requires_grad_() for parameter in wanted]
        hidden = torch.nn.functional.gelu(torch.nn.functional.linear(eager, *leaves[:2]))
        loss = torch.nn.functional.linear(hidden, *leaves[2:]).square().sum()
        for a, b in zip(got, torch.autograd.grad(loss, [eager, *leaves]), strict=True):
            torch.testing.assert_close(a, b)
        on_device.zero_grad()


def test_two_graphs_share_a_pool(x: Tensor) -> None:
    pool = torch.npu.graph_pool_handle()
    first, between = captured(lambda: (x + 1).relu(), pool=pool)
    second, result = captured(lambda: (between * 2).sigmoid(), pool=pool)
    assert first.pool() == second.pool() == pool
    for seed in range(REPLAYS):
        x.copy_(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)))
        first.replay()
        second.replay()
        assert torch.equal(result, ((x + 1).relu() * 2).sigmoid())


def test_a_replay_allocates_nothing(x: Tensor, weight: Tensor) -> None:
    graph, result = captured(lambda: fused_step(x, weight))
    address = result.data_ptr()
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    graph.replay()
    assert torch.npu.max_memory_allocated() == before and result.data_ptr() == address


def test_a_forked_stream_is_captured_and_joined(x: Tensor, side: torch.npu.Stream) -> None:
    def step() -> Tensor:
        first, main = x + 1, torch.npu.current_stream()
        side.wait_stream(main)
        with torch.npu.stream(side):
            assert torch.npu.is_current_stream_capturing()
            doubled = first * 2
        shifted = first - 3
        main.wait_stream(side)
        return doubled + shifted

    graph, result = captured(step)
    for seed in range(REPLAYS):
        x.copy_(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(result, (x + 1) * 2 + ((x + 1) - 3))


def test_what_another_stream_does_during_a_capture_runs_at_once(x: Tensor, side: torch.npu.Stream) -> None:
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        inside = x + 1
        with torch.npu.stream(side):
            outside = x * 2
    assert torch.equal(outside, x * 2) and inside.isnan().all()


def test_random_operators_draw_anew_at_each_replay_as_eager_calls_would(x: Tensor) -> None:
    def step() -> Tensor:
        return torch.nn.functional.dropout(x, 0.5) + torch.rand_like(x)

    torch.npu.manual_seed(1)
    before = torch.npu.get_rng_state()
    graph, result = captured(step)
    assert torch.equal(torch.npu.get_rng_state(), before)
    torch.npu.manual_seed(7)
    replayed = []
    for _ in range(REPLAYS):
        graph.replay()
        replayed.append(result.clone())
    torch.npu.manual_seed(7)
    assert all(torch.equal(one, step()) for one in replayed)
    assert len({tuple(one.flatten().tolist()) for one in replayed}) == REPLAYS


def test_pinned_memory_is_read_at_each_replay(x: Tensor) -> None:
    host = torch.zeros(4, 8).pin_memory()
    graph, result = captured(lambda: host.to("npu", non_blocking=True) + x)
    for value in range(3):
        host.fill_(value)
        graph.replay()
        assert torch.equal(result, x + value)


def test_pinned_memory_is_written_at_each_replay_and_not_waited_for(x: Tensor) -> None:
    host = torch.full((4, 8), -1.0).pin_memory()
    graph, _ = captured(lambda: host.copy_(x + 1, non_blocking=True))
    assert bool((host == -1).all())  # the capture copied nothing
    for value in range(3):
        x.fill_(value)
        with simulator.count() as counted:
            graph.replay()
        assert bool((host == value + 1).all()) and counted.host_copies == 0


def test_a_replay_is_one_launch_and_its_kernels_are_counted_apart(x: Tensor, weight: Tensor) -> None:
    with simulator.count() as eager:
        fused_step(x, weight)
    with simulator.count() as capture:
        graph, _ = captured(lambda: fused_step(x, weight))
    assert launches(capture) == capture.replays == capture.replayed == 0
    with simulator.count() as counted:
        x.zero_()
        for _ in range(3):
            graph.replay()
    assert (launches(counted), counted.replays, counted.replayed) == (1 + 3, 3, 3 * eager.launches)
    assert counted.kernels == counted.launches - 3 + 3 * eager.launches
    assert counted.replayed_by_op == {name: (3 * n, 3 * moved) for name, (n, moved) in eager.by_op.items()}
    assert counted.by_op["aclmdlRIExecuteAsync"] == (3, 3 * eager.bytes)
    assert counted.bytes == sum(moved for _, moved in counted.by_op.values())
    assert f"{3 * eager.launches} kernels of 3 replays" in str(counted)
    assert counted.host_copies == 0


def test_a_static_decode_step_gives_the_tokens_of_eager_decoding(npu: torch.device) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.Qwen3ForCausalLM(config).eval().to(npu)
    prompt, new = torch.tensor([[5, 9, 2, 7], [1, 4, 9, 16]], device=npu), 12

    def decoder() -> tuple[Tensor, Callable[[], Tensor]]:
        cache = transformers.StaticCache(config=config, max_cache_len=32)
        token = model(prompt, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)

        def step() -> Tensor:
            logits = model(token, past_key_values=cache, use_cache=True).logits
            return token.copy_(logits[:, -1].argmax(-1, keepdim=True))

        return token, step

    with torch.no_grad():
        token, step = decoder()
        wanted = [token.clone(), *(step().clone() for _ in range(new))]
        token, step = decoder()
        got = [token.clone(), step().clone()]  # warm
        graph, _ = captured(step)
        with simulator.count() as counted:
            for _ in range(new - 1):
                graph.replay()
                got.append(token.clone())
    assert torch.equal(torch.cat(got, 1), torch.cat(wanted, 1))
    assert launches(counted) == 2 * (new - 1) and counted.replayed > 20 * (new - 1)
