"""The gated delta rule against the recurrence in float64, token by token."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from npu_patch import simulator
from npu_patch.ops.gated_delta.chunk_scan import scan_backward, scan_forward
from npu_patch.ops.gated_delta.rule import Tiling, gated_delta_rule
from npu_patch.ops.gated_delta.triangular_inverse import unit_lower_inverse
from tests.support.gated_delta_stand_ins import called_as_flas
from tests.support.gated_delta_stand_ins import own_rule as chunk_gated_delta_rule
from tests.support.gradients import relative_error
from tests.support.parity import NEAR, RATIO

recurrent_gated_delta_rule = called_as_flas(gated_delta_rule)
NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, cu: list[int] | None, norm: bool
) -> tuple[Tensor, Tensor]:
    """Output `[B, T, Hv, V]` and final states, float64."""
    q, k, v, g, beta = (x.double() for x in (q, k, v, g, beta))
    heads, per_key = v.shape[2], v.shape[2] // k.shape[2]
    if norm:
        q, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(per_key, 2) for x in (q * k.shape[-1] ** -0.5, k))
    outputs, finals = [], []
    for n, (start, end) in enumerate([(0, q.shape[1])] if cu is None else itertools.pairwise(cu)):
        s = q.new_zeros(q.shape[0], heads, k.shape[-1], v.shape[-1])
        if state is not None:
            s = (state if cu is None else state[n : n + 1]).double()
        for t in range(start, end):
            s = s * g[:, t].exp()[..., None, None]
            written = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", s, k[:, t]))
            s = s + k[:, t, ..., None] * written[..., None, :]
            outputs.append(torch.einsum("bhkv,bhk->bhv", s, q[:, t]))
        finals.append(s)
    return torch.stack(outputs, 1), torch.cat(finals)


def make(
    tokens: int,
    *,
    batch: int = 1,
    key_heads: int = 2,
    heads: int = 4,
    width: int = 6,
    value_width: int = 5,
    decay: float = 1.0,
    states: int = 0,
    norm: bool = True,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k = (rand(batch, tokens, key_heads, width) for _ in range(2))
    if not norm:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    g = -decay * torch.rand(batch, tokens, heads, generator=generator)
    beta = torch.rand(batch, tokens, heads, generator=generator)
    beta[:, ::5], beta[:, 1::5] = 0, 1
    state = rand(states, heads, width, value_width) if states else None
    v = rand(batch, tokens, heads, value_width)
    at_least_float32 = torch.promote_types(dtype, torch.float32)
    state = None if state is None else state.to(at_least_float32)
    return [q.to(dtype), k.to(dtype), v.to(dtype), g.to(at_least_float32), beta.to(dtype), state]


def compare(
    rule: Callable[..., tuple[Tensor, Tensor | None]],
    arguments: list[Tensor | None],
    *,
    cu: list[int] | None = None,
    norm: bool = True,
    final: bool = True,
    **options: object,
) -> dict[str, float]:
    """Relative errors of output, final state and all gradients, the final state's gradient included if `final`."""
    ours = [x if x is None else x.clone().requires_grad_() for x in arguments]
    exact = [x if x is None else x.double().requires_grad_() for x in arguments]
    bounds = {} if cu is None else {"cu_seqlens": torch.tensor(cu)}
    o, state = rule(
        *ours[:5], initial_state=ours[5], output_final_state=final, use_qk_l2norm_in_kernel=norm, **bounds, **options
    )
    o_exact, state_exact = recurrence(*exact, cu, norm)
    assert o.dtype == arguments[0].dtype and o.shape == o_exact.shape
    random = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64}
    do, d_state = torch.randn(o.shape, **random), torch.randn(state_exact.shape, **random)
    loss, loss_exact = (o.double() * do).sum(), (o_exact * do).sum()
    errors = {"o": relative_error(o.detach().double(), o_exact.detach())}
    if final:
        assert state.dtype == torch.promote_types(arguments[0].dtype, torch.float32)
        errors["final"] = relative_error(state.detach().double(), state_exact.detach())
        loss, loss_exact = loss + (state.double() * d_state).sum(), loss_exact + (state_exact * d_state).sum()
    else:
        assert state is None
    names = [name for name, x in zip(NAMES, ours, strict=True) if x is not None]
    found = torch.autograd.grad(loss, [x for x in ours if x is not None], materialize_grads=True)
    expected = torch.autograd.grad(loss_exact, [x for x in exact if x is not None])
    for name, a, b in zip(names, found, expected, strict=True):
        assert a.dtype == arguments[NAMES.index(name)].dtype
        errors[name] = relative_error(a.double(), b)
    return errors


def assert_exact(errors: dict[str, float], bar: float = 1e-12) -> None:
    assert all(error <= bar for error in errors.values()), errors


@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 33, 64, 70])
@pytest.mark.parametrize("final", [True, False])
def test_every_length_forward_and_gradients(tokens: int, final: bool) -> None:
    arguments = make(tokens, batch=2, states=2, dtype=torch.float64)
    assert_exact(compare(chunk_gated_delta_rule, arguments, final=final, tiling=Tiling(16)))


@pytest.mark.parametrize("tiling", [Tiling(64), Tiling(32, 1), Tiling(8, 2), Tiling(8, 3), Tiling(8, 16), Tiling(1, 4)])
def test_every_tiling_computes_the_same(tiling: Tiling) -> None:
    arguments = make(75, states=1, dtype=torch.float64)
    assert_exact(compare(chunk_gated_delta_rule, arguments, tiling=tiling))


@pytest.mark.parametrize(("key_heads", "heads"), [(1, 1), (3, 3), (1, 3), (2, 6)])
@pytest.mark.parametrize("norm", [True, False])
def test_heads_grouped_and_not(key_heads: int, heads: int, norm: bool) -> None:
    arguments = make(21, batch=2, key_heads=key_heads, heads=heads, norm=norm, dtype=torch.float64)
    assert_exact(compare(chunk_gated_delta_rule, arguments, norm=norm, tiling=Tiling(8, 2)))


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize(
    "cu", [[0, 75], [0, 1, 2, 3, 75], [0, 1, 34, 64, 75], [0, 30, 30, 33, 75], [0, 16, 32, 48, 64, 75], [0, 0, 75]]
)
def test_packed_sequences_are_kept_apart(cu: list[int], final: bool, states: bool) -> None:
    arguments = make(75, states=(len(cu) - 1) * states, dtype=torch.float64)
    # The unit keys that stand for a state are normalized to 1 within 5e-13.
    bar = 1e-11 if states else 1e-12
    assert_exact(compare(chunk_gated_delta_rule, arguments, cu=cu, final=final, tiling=Tiling(16, 2)), bar)


def test_a_packed_sequence_does_not_notice_what_precedes_it() -> None:
    q, k, v, g, beta, _ = make(60)

    def second() -> Tensor:
        bounds = torch.tensor([0, 25, 60])
        options = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": bounds, "tiling": Tiling(16)}
        return chunk_gated_delta_rule(q, k, v, g, beta, **options)[0][:, 25:]

    before = second()
    v[:, :25], k[:, :25], g[:, :25] = 1e4, 1e4, 0
    assert torch.equal(second(), before)


@pytest.mark.parametrize("decay", [0.0, 1e-4, 1.0, 30.0, 500.0])
@pytest.mark.parametrize("cu", [None, [0, 1, 64, 100, 150]])
def test_gates_near_zero_and_far_below_minus_one_in_float32(decay: float, cu: list[int] | None) -> None:
    arguments = make(150, width=16, value_width=8, decay=decay, dtype=torch.float32)
    errors = compare(chunk_gated_delta_rule, arguments, cu=cu)
    dg = errors.pop("g")
    assert_exact(errors, NEAR)
    if decay < 500:  # beyond, the exact gradient is no more than what float32 rounds off
        assert dg < 1e-5, dg


def test_a_single_strong_decay_costs_the_tokens_after_it_no_digits() -> None:
    arguments = make(64, width=16, value_width=8, decay=1e-2)
    arguments[3][:, 3] = -1000.0
    errors = compare(chunk_gated_delta_rule, arguments)
    errors.pop("g")
    assert_exact(errors, 5e-7)


def test_equal_keys_without_decay_stay_exact() -> None:
    """The hardest inverse: every entry below the diagonal of A is 1."""
    q, k, v, g, beta, _ = make(128, width=16)
    k = k[:, :1].expand_as(k)
    errors = compare(chunk_gated_delta_rule, [q, k, v, torch.zeros_like(g), torch.ones_like(beta), None])
    errors.pop("g")
    assert_exact({name: errors[name] for name in ("o", "final", "v", "beta")}, 2e-6)


def test_bfloat16_is_no_further_from_float64_than_transformers() -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    original = modeling.torch_chunk_gated_delta_rule

    def theirs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        return original(q, k, v, g=g, beta=beta, **options)

    arguments = make(200, width=32, value_width=24, dtype=torch.bfloat16)
    ours = compare(chunk_gated_delta_rule, arguments)
    reference = compare(theirs, arguments)
    for name, error in ours.items():
        assert error <= RATIO * reference[name], (name, error, reference[name])


@pytest.mark.parametrize("wanted", NAMES)
def test_only_the_gradients_asked_for(wanted: str) -> None:
    arguments = make(20, states=1, dtype=torch.float64)
    everything = [x.clone().requires_grad_() for x in arguments]
    o, state = chunk_gated_delta_rule(*everything[:5], initial_state=everything[5], output_final_state=True)
    expected = torch.autograd.grad(o.sum() + state.sum(), everything[NAMES.index(wanted)])[0]
    one = [x.clone().requires_grad_(name == wanted) for name, x in zip(NAMES, arguments, strict=True)]
    o, state = chunk_gated_delta_rule(*one[:5], initial_state=one[5], output_final_state=True)
    gradients = o.grad_fn.apply(torch.ones_like(o), torch.ones_like(state))
    assert [i for i, gradient in enumerate(gradients) if gradient is not None] == [NAMES.index(wanted)]
    assert torch.allclose(gradients[NAMES.index(wanted)], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("through", ["output", "final state"])
@pytest.mark.parametrize("cu", [None, [0, 3, 20]])
def test_a_gradient_through_one_result_alone(through: str, cu: list[int] | None) -> None:
    arguments = make(20, dtype=torch.float64)
    ours, exact = ([x.clone().requires_grad_() for x in arguments[:5]] for _ in range(2))
    bounds = None if cu is None else torch.tensor(cu)
    results = chunk_gated_delta_rule(*ours, output_final_state=True, cu_seqlens=bounds, tiling=Tiling(8))
    expected = recurrence(*exact, None, cu, False)
    index = ("output", "final state").index(through)
    weights = torch.randn(expected[index].shape, dtype=torch.float64)
    found = torch.autograd.grad((results[index] * weights).sum(), ours[int(index) :])
    wanted = torch.autograd.grad((expected[index] * weights).sum(), exact[int(index) :])
    for name, a, b in zip(NAMES[index:], found, wanted, strict=False):
        assert relative_error(a, b) < 1e-12, name


@pytest.mark.parametrize(("group", "groups"), [(1, 0), (2, 2), (4, 1)])
def test_the_backward_keeps_arguments_inverses_and_a_state_for_each_group(group: int, groups: int) -> None:
    """`groups` of several chunks; 256 tokens are 4 chunks."""
    q, k, v, g, beta, _ = make(256, width=32, value_width=32)
    leaves = [x.requires_grad_() for x in (q, k, v, g, beta)]
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunk_gated_delta_rule(*leaves, tiling=Tiling(64, group))
    own = {x.untyped_storage().data_ptr() for x in leaves}
    inverses, states = 256 // 64 * 4 * 64 * 64, groups * 4 * 32 * 32
    assert sum(size for storage, size in kept.items() if storage not in own) == inverses + states


@pytest.mark.parametrize("group", [1, 2])
def test_a_second_backward_of_a_retained_graph_gives_the_same(group: int) -> None:
    q, k, v, g, beta, _ = make(256, width=32, value_width=32)
    leaves = [x.requires_grad_() for x in (q, k, v, g, beta)]
    o, _ = chunk_gated_delta_rule(*leaves, use_qk_l2norm_in_kernel=True, tiling=Tiling(64, group))
    once = torch.autograd.grad(o.square().sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(o.square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("states", [0, 2])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("tokens", [1, 3])
def test_recurrent_steps(states: int, final: bool, tokens: int) -> None:
    arguments = make(tokens, batch=2, states=states, dtype=torch.float64)
    arguments[4].fill_(0.7)
    assert_exact(compare(recurrent_gated_delta_rule, arguments, final=final))


def test_a_step_leaves_the_given_state_alone() -> None:
    q, k, v, g, beta, state = make(1, states=1)
    before = state.clone()
    recurrent_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)
    assert torch.equal(state, before)


def test_steps_continue_a_prefill() -> None:
    q, k, v, g, beta, _ = make(40, dtype=torch.float64)
    o, _ = recurrence(q, k, v, g, beta, None, None, True)
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    found, state = chunk_gated_delta_rule(*(x[:, :37] for x in (q, k, v, g, beta)), **options)
    steps = [found]
    for t in range(37, 40):
        step, state = recurrent_gated_delta_rule(
            *(x[:, t : t + 1] for x in (q, k, v, g, beta)), initial_state=state, **options
        )
        steps.append(step)
    assert relative_error(torch.cat(steps, 1), o) < 1e-12


@pytest.mark.parametrize("tokens", [1, 70])
def test_autocast_rounds_nothing_inside(tokens: int, npu: torch.device) -> None:
    """Mixed precision hands over rounded arguments; the states stay in float32."""
    arguments = [x.to(npu).requires_grad_() for x in make(tokens, states=1)]
    rule = recurrent_gated_delta_rule if tokens == 1 else chunk_gated_delta_rule

    def results(autocast: bool) -> list[Tensor]:
        with torch.autocast("npu", torch.bfloat16, enabled=autocast):
            o, final = rule(*arguments[:5], initial_state=arguments[5], output_final_state=True)
        return [o, final, *torch.autograd.grad(o.square().sum() + final.square().sum(), arguments)]

    expected, found = results(autocast=False), results(autocast=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_arguments_of_any_memory_layout() -> None:
    arguments = make(40, batch=2, dtype=torch.float64)
    strided = [x if x is None else x.transpose(1, -1).contiguous().transpose(1, -1) for x in arguments]
    assert not strided[0].is_contiguous()
    assert_exact(compare(chunk_gated_delta_rule, strided, tiling=Tiling(16)))


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v, g, beta, _ = make(8, batch=2)
    with pytest.raises(ValueError, match="Hk dividing Hv"):
        chunk_gated_delta_rule(q, k, v[:, :, :3], g, beta)
    with pytest.raises(ValueError, match="g and beta"):
        chunk_gated_delta_rule(q, k, v, g[:, :, :2], beta)
    with pytest.raises(ValueError, match="batch must be 1"):
        chunk_gated_delta_rule(q, k, v, g, beta, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="initial state"):
        chunk_gated_delta_rule(q, k, v, g, beta, initial_state=torch.zeros(1, 4, 6, 5))


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("packed", [False, True])
def test_on_the_npu_without_host_copies_and_in_few_launches(npu: torch.device, packed: bool) -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    arguments = [x.to(npu) for x in make(4096, key_heads=1, heads=1, width=16, value_width=8)[:5]]
    cu = torch.tensor([0, 100, 4096], device=npu) if packed else None

    def launches(rule: Callable[..., tuple[Tensor, Tensor | None]]) -> tuple[int, int]:
        leaves = [x.clone().requires_grad_() for x in arguments]
        with simulator.count() as forward:
            o = rule(*leaves)[0]
        with simulator.count() as backward:
            torch.autograd.grad(o, leaves, torch.ones_like(o))
        assert forward.host_copies == backward.host_copies == 0
        return forward.launches, forward.launches + backward.launches

    ours = launches(lambda *a: chunk_gated_delta_rule(*a, use_qk_l2norm_in_kernel=True, cu_seqlens=cu))
    theirs = launches(
        lambda q, k, v, g, beta: modeling.torch_chunk_gated_delta_rule(
            q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True
        )
    )
    assert ours[0] < theirs[0] / 4 and ours[1] < theirs[1] / 4, (ours, theirs)


@pytest.mark.parametrize("size", [1, 2, 8, 16, 32, 64, 128])
def test_triangular_inverse(size: int) -> None:
    a = torch.randn(3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)) / size**0.5
    expected = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + a.tril(-1))
    assert relative_error(unit_lower_inverse(a), expected) < 1e-13
    equal = torch.ones(1, size, size)
    assert torch.equal(unit_lower_inverse(equal) @ (torch.eye(size) + equal.tril(-1)), torch.eye(size)[None])


@pytest.mark.parametrize(("length", "groups"), [(1, 1), (1, 5), (5, 1), (3, 4), (4, 2)])
def test_scan_is_the_recurrence_and_its_transpose(length: int, groups: int) -> None:
    z, k, v = 2, 3, 4
    m = torch.randn(length, groups, z, k, k, dtype=torch.float64)
    added = torch.randn(length, groups, z, k, v, dtype=torch.float64, requires_grad=True)
    first = torch.randn(z, k, v, dtype=torch.float64, requires_grad=True)
    state, entering = first, {}
    for j in range(groups):
        for i in range(length):
            entering[i, j] = state
            state = m[i, j] @ state + added[i, j]
    weights = torch.randn(length + 1, groups, z, k, v, dtype=torch.float64)
    loss = sum((entering[i, j] * weights[i, j]).sum() for i, j in entering) + (state * weights[-1, -1]).sum()
    d_added, d_first = torch.autograd.grad(loss, (added, first))

    states = torch.full((length + 1, groups, z, k, v), float("nan"), dtype=torch.float64)
    states[1:], states[0, 0] = added.detach(), first.detach()
    scan_forward(m, states)
    assert all(torch.allclose(states[i, j], entering[i, j]) for i, j in entering)
    assert torch.allclose(states[-1, -1], state)
    known = states.clone()
    known[1:] = added.detach()
    scan_forward(m, known, groups_known=True)
    assert all(torch.allclose(known[i, j], entering[i, j]) for i, j in entering)
    assert torch.allclose(known[-1, -1], state)
    gradients = weights.clone()
    scan_backward(m, gradients)
    assert torch.allclose(gradients[1:], d_added) and torch.allclose(gradients[0, 0], d_first)
