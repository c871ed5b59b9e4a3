"""Logits that wait are to everybody the tensor of the original, and are made once somebody looks, not before."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor
from torch.optim import optimizer

from npu_patch.waiting.before_steps import USED_BY
from npu_patch.waiting.head_call import layers_of, put_off
from npu_patch.waiting.logits import WaitingLogits
from npu_patch.waiting.origins import ReadTooLate
from tests.support.gradients import relative_error

BATCH, TOKENS, WIDTH, VOCABULARY = 3, 7, 10, 23
Use = Callable[[Tensor], Any]


def loaded(z: Tensor) -> Tensor:
    stream = io.BytesIO()
    torch.save(z, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def written(z: Tensor) -> Tensor:
    z[:, :, 2] = -5.0
    return z * 2


def added_in_place(z: Tensor) -> Tensor:
    return z.mul_(3).add_(1)


def written_through_a_view(z: Tensor) -> tuple[Tensor, Tensor]:
    single, view = z.float(), z.transpose(0, 1)
    view.mul_(2)
    return single, z + 0


# What others do, and whether it can be done with gradients.
USES: dict[str, tuple[Use, bool]] = {
    "argmax": (lambda z: z.argmax(-1), True),
    "log_softmax": (lambda z: z.log_softmax(-1), True),
    "columns": (lambda z: z[..., 3:9], True),
    "mask": (lambda z: z[torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)], True),
    "cat": (lambda z: torch.cat((z, z), 1), True),
    "add": (lambda z: z + z.detach(), True),
    "cpu": (lambda z: z.detach().cpu(), True),
    "numpy": (lambda z: torch.from_numpy(z.detach().float().cpu().numpy()), True),
    "its numpy": (lambda z: torch.from_numpy(z.cpu().float().numpy()), False),
    "tolist": (lambda z: torch.tensor(z.tolist()), True),
    "data": (lambda z: z.data + 0, True),
    "pickle": (lambda z: pickle.loads(pickle.dumps(z)), True),
    "saved": (loaded, True),
    "deepcopy": (copy.deepcopy, False),
    "topk": (lambda z: tuple(z.topk(3)), True),
    "divergence": (lambda z: F.kl_div(z.log_softmax(-1), z.detach().softmax(-1), reduction="none"), True),
    "capped": (lambda z: (z / 3).tanh().mul(3).float()[:, :-1].contiguous().view(-1, VOCABULARY).exp(), True),
    "one token": (lambda z: z[:, -1].exp(), True),
    "one sample": (lambda z: z[0].exp(), True),
    "repr": (lambda z: torch.tensor([float(len(repr(z.detach())))]), True),
    "iteration": (lambda z: torch.stack([each.exp() for each in z]), True),
    "written": (written, True),
    "in place": (added_in_place, True),
    "through a view": (written_through_a_view, True),
    "copied into": (lambda z: torch.zeros_like(z).copy_(z), True),
}
MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("npu", torch.bfloat16),
}


def head_and_rows(npu: torch.device, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(1)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False).to(npu, dtype)
    return head, torch.randn(BATCH, TOKENS, WIDTH).to(npu, dtype).requires_grad_()


def waiting(head: torch.nn.Module, rows: Tensor, readers: list[str]) -> WaitingLogits:
    with put_off(head, layers_of(head), "npu", readers.append) as call:
        z = head(rows)
    assert call.waited and isinstance(z, WaitingLogits) and not z.settled
    return z


def flat(value: Any) -> Iterator[Tensor]:
    yield from value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_what_a_z_loss_asks_for_is_computed_while_they_wait(mode: str, dtype: torch.dtype, npu: torch.device) -> None:
    """But not what is summed over anything else."""
    head, rows = head_and_rows(npu, dtype)
    readers: list[str] = []

    def results(z: Any) -> list[Tensor]:
        found = [z.logsumexp(-1), z.logsumexp(dim=2, keepdim=True), (z.float() / 3).logsumexp(-1)]
        if not found[0].requires_grad:
            return found
        total = sum(each.float().pow(2).mean() for each in found)
        return [*found, *torch.autograd.grad(total, [rows, head.weight])]

    with MODES[mode]():
        expected, z = results(head(rows)), waiting(head, rows, readers)
        found = results(z)
        assert not readers and not z.settled
        over_tokens = z.logsumexp(1)
        assert len(readers) == 1 and torch.equal(over_tokens, head(rows).logsumexp(1))
    rounded = dtype == torch.bfloat16 or mode == "autocast"
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert relative_error(one.detach(), other.detach()) < (1e-2 if rounded else 1e-6)


def test_gradients_of_a_z_loss_reach_who_listens_to_the_logits(npu: torch.device) -> None:
    head, rows = head_and_rows(npu)

    def heard(z: Tensor) -> Tensor:
        z.retain_grad()
        z.logsumexp(-1).pow(2).sum().backward()
        assert z.grad is not None
        return z.grad

    assert relative_error(heard(waiting(head, rows, [])), heard(head(rows))) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use", USES)
def test_whoever_uses_them_gets_the_original(use: str, mode: str, npu: torch.device) -> None:
    what, differentiable = USES[use]
    if mode == "gradients" and not differentiable:
        pytest.skip("torch refuses it")
    head, rows = head_and_rows(npu)
    readers: list[str] = []
    with MODES[mode]():
        z, expected = waiting(head, rows, readers), head(rows)
        assert (z.dtype, z.shape, z.stride(), z.device) == (
            expected.dtype,
            expected.shape,
            expected.stride(),
            expected.device,
        )
        assert (z.requires_grad, z.is_leaf) == (expected.requires_grad, expected.is_leaf)
        if mode == "autocast" and not differentiable:
            z, expected = z.detach(), expected.detach()
        found, wanted = what(z), what(expected)
    for one, other in zip(flat(found), flat(wanted), strict=True):
        assert (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, other.requires_grad)
        assert torch.equal(one, other)
        if other.requires_grad and other.grad_fn is not None:
            inputs = (rows, *head.parameters())
            of_one, of_other = (
                torch.autograd.grad(each.float().square().sum(), inputs, retain_graph=True) for each in (one, other)
            )
            for each, at in zip(of_one, of_other, strict=True):
                assert relative_error(each, at) < (1e-6 if mode == "gradients" else 1e-2)
    assert len(readers) == (0 if use == "repr" else 1)


def test_a_reader_is_named_once_however_often_it_reads(npu: torch.device) -> None:
    readers: list[str] = []
    z = waiting(*head_and_rows(npu), readers)
    z.float().argmax(-1), z.max(), z[:, 1:].sum()
    assert readers == [f"argmax in {__name__}"]
    assert z.settled


@pytest.mark.parametrize(
    "ask",
    [
        lambda z: (z.shape, z.size(-1), z.dim(), z.dtype, z.device, z.requires_grad, z.grad_fn, z.is_leaf, len(z)),
        lambda z: z.detach(),
        lambda z: z.float(),
        lambda z: z.bfloat16().float().contiguous(),
        lambda z: z[:, :-1, :].contiguous().view(-1, z.size(-1)),
        lambda z: (z * 0.3, 0.3 * z, z / 7, torch.tanh(z)),
        lambda z: z.clone(),
        lambda z: z.data,
        lambda z: z.register_hook(lambda grad: None),
        lambda z: (z.to(z.device), z.to(z.dtype), z.view(z.shape)),
        lambda z: isinstance(z, Tensor) and torch.is_tensor(z) and z.is_floating_point(),
        repr,
    ],
)
def test_what_needs_no_numbers_leaves_them_waiting(ask: Use, npu: torch.device) -> None:
    readers: list[str] = []
    z = waiting(*head_and_rows(npu), readers)
    ask(z)
    assert readers == [] and not z.settled


def test_who_looks_on_gets_logits_that_wait_by_themselves(npu: torch.device) -> None:
    readers: list[str] = []
    z = waiting(*head_and_rows(npu), readers)
    seen = z.peek()
    assert isinstance(seen, WaitingLogits) and not seen.requires_grad
    assert torch.equal(seen.exp(), head_and_rows(npu)[0](head_and_rows(npu)[1]).exp())
    assert readers == [] and not z.settled
    assert torch.equal(z.materialise("a test"), z.materialise("another")) and readers == ["a test"]


FOLLOWED: dict[str, Use] = {
    "as they are": lambda z: z,
    "capped": lambda z: torch.tanh(z / 3.0) * 3.0,
    "scaled": lambda z: z * 0.25,
    "float": lambda z: z.float() / 5,
    "without the last token": lambda z: z[:, :-1].contiguous(),
    "flat": lambda z: z[:, 2:].reshape(-1, VOCABULARY),
    "one sample": lambda z: z[1],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("followed", FOLLOWED)
def test_what_a_loss_takes_is_what_they_would_be(followed: str, dtype: torch.dtype, npu: torch.device) -> None:
    head, rows = head_and_rows(npu, dtype)
    readers: list[str] = []
    z, expected = FOLLOWED[followed](waiting(head, rows, readers)), FOLLOWED[followed](head(rows))
    logits = z.taken()
    assert not isinstance(logits, str)
    found, _ = logits.computed()
    assert relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 1e-2) and found.dtype == z.dtype
    for each, at in zip(*(torch.autograd.grad(y.sum(), (rows, head.weight)) for y in (found, expected)), strict=True):
        assert relative_error(each, at) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert readers == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_peft_wrapped_is_followed_with_its_dropout(dtype: torch.dtype, npu: torch.device) -> None:
    torch.manual_seed(2)
    base = torch.nn.Linear(WIDTH, VOCABULARY).to(npu, dtype)
    head = LoraLinear(base, "a", config=LoraConfig(r=2, lora_dropout=0.3), r=2, lora_alpha=3).to(npu)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    rows, readers = head_and_rows(npu, dtype)[1], []
    torch.manual_seed(5)
    logits = waiting(head, rows, readers).taken()
    torch.manual_seed(5)
    expected = head(rows)
    assert not isinstance(logits, str)
    found, _ = logits.computed()
    assert torch.equal(found, expected) and readers == []
    given = [rows, *(each for each in head.parameters() if each.requires_grad)]
    for each, at in zip(*(torch.autograd.grad(y.sum(), given) for y in (found, expected)), strict=True):
        assert relative_error(each, at) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("no_gradients", [lambda z: z.detach(), lambda z: z.data])
def test_logits_without_gradients_give_a_loss_none(no_gradients: Use, npu: torch.device) -> None:
    logits = no_gradients(waiting(*head_and_rows(npu), [])).float().taken()
    assert not any(each is not None and each.requires_grad for each in logits.tensors)


@pytest.mark.parametrize("write", [written, added_in_place, written_through_a_view])
def test_logits_that_were_written_to_are_not_what_they_were_made_of(write: Use, npu: torch.device) -> None:
    z = waiting(*head_and_rows(npu), [])
    write(z)
    assert z.taken() == "the logits are changed in place"


@pytest.mark.parametrize("name", ["weight", "hidden states"])
def test_reading_after_what_they_are_made_of_has_changed_is_an_error_that_says_so(name: str, npu: torch.device) -> None:
    head, rows = head_and_rows(npu)
    z = waiting(head, rows, [])
    early = waiting(head, rows, [])
    early.materialise("a test")
    with torch.no_grad():
        (head.weight if name == "weight" else rows).add_(1)
    assert torch.isfinite(early).all()
    with pytest.raises(ReadTooLate, match=f"after the {name} changed in place"):
        z.argmax(-1)
    assert z.taken() == f"the {name} changed in place"


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_logits_that_are_kept_beyond_an_optimizers_step_are_those_of_before(
    autocast: bool, trained: bool, npu: torch.device
) -> None:
    head, rows = head_and_rows(npu)
    head.requires_grad_(trained)
    other = torch.nn.Linear(2, 2)
    readers: list[str] = []
    with torch.autocast("npu", torch.bfloat16, enabled=autocast):
        z, expected = waiting(head, rows, readers).float(), head(rows).float()
        dropped = waiting(head, rows, readers)
    del dropped
    expected.sum().backward()
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    assert readers == []
    torch.optim.SGD([*head.parameters(), *other.parameters()], lr=1.0).step()
    assert torch.equal(z, expected)
    by_the_step = trained and not autocast  # which multiplied by a copy of the weight
    assert readers == [USED_BY if by_the_step else f"equal in {__name__}"]


def test_optimizers_are_listened_to_only_while_logits_wait(npu: torch.device) -> None:
    head, rows = head_and_rows(npu)
    before = dict(optimizer._global_optimizer_pre_hooks)
    z = waiting(head, rows, [])
    assert len(optimizer._global_optimizer_pre_hooks) == len(before) + 1
    del z
    assert dict(optimizer._global_optimizer_pre_hooks) == before


def test_memory_that_was_given_back_is_not_read(npu: torch.device) -> None:
    """As FSDP gives back the weights that it gathered."""
    head, rows = head_and_rows(npu)
    z = waiting(head, rows, [])
    head.weight.untyped_storage().resize_(0)
    with pytest.raises(ReadTooLate, match="memory of the weight was given back"):
        z.argmax(-1)


@pytest.mark.parametrize("use", ["argmax", "capped", "in place", "data", "repr", "columns"])
def test_nothing_outlives_them(use: str, npu: torch.device) -> None:
    """A circle through autograd is found by no garbage collector."""
    head, rows = head_and_rows(npu)
    USES[use][0](waiting(head, rows, []))  # torch's own first time keeps frames
    hidden = rows * 2
    z = waiting(head, hidden, [])
    kept = weakref.ref(z._numbers.origin)
    found = USES[use][0](z)
    if found.requires_grad:
        found.sum().backward()
    del z, hidden, found
    assert kept() is None


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (lambda: torch.nn.Sequential(torch.nn.Embedding(3, 4)), "not made of linear layers"),
        (lambda: _hooked(torch.nn.Linear(4, 6)), "hooks on the head"),
        (lambda: _own_forward(torch.nn.Linear(4, 6)), "with a forward of its own"),
        (lambda: torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 6)), "parametrized"),
        (lambda: torch.nn.Sequential(_hooked(torch.nn.Linear(4, 6))), "hooks on 0"),
    ],
)
def test_a_head_that_somebody_listens_to_is_left_as_it_is(head: Callable[[], torch.nn.Module], reason: str) -> None:
    found = layers_of(head())
    assert isinstance(found, str) and reason in found


def _hooked(module: torch.nn.Module) -> torch.nn.Module:
    module.register_forward_hook(lambda *call: None)
    return module


def _own_forward(module: torch.nn.Module) -> torch.nn.Module:
    module.forward = module.forward
    return module


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda head, rows: (head, rows[:, :1]), "single tokens"),
        (lambda head, rows: (head, rows[:, :0]), "single tokens"),
        (lambda head, rows: (head.double(), rows.double()), "a head of torch.float64"),
    ],
)
def test_what_is_not_put_off_is_the_original(change: Any, reason: str) -> None:
    head, rows = change(*head_and_rows(torch.device("cpu")))
    with put_off(head, layers_of(head), "cpu", lambda reader: None) as call:
        found = head(rows)
    assert type(found) is Tensor and torch.equal(found, head(rows))
    assert not call.waited and reason in call.why_not
    assert not head._forward_pre_hooks
