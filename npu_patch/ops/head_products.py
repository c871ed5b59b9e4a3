"""What logits are made of: products of rows with the head's weights, and what is done with each element after.

Chunks of it can be computed by rows (tokens) or by columns (of the vocabulary), with the roundings of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Term:
    """`rows @ weight.T + bias`, with rows `[..., K]`, weight `[V, K]`, bias `[V]`, of one dtype."""

    rows: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def product(self, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """Of some rows, which are `[N, K]` then, and some columns."""
        part, weight, bias = self.rows, self.weight, self.bias
        if rows != ALL:
            part = part[rows]
        if columns != ALL:
            weight, bias = weight[columns], None if bias is None else bias[columns]
        return F.linear(part, weight, bias)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.rows, self.weight, self.bias


@dataclass(frozen=True)
class Expression:
    """Of the products of some terms, element by element. `value` notes in `kept` what `gradient` will need;
    that hands the gradient of each product to `into`, by the number of its term."""

    def value(self, products: Sequence[Tensor], kept: dict[Expression, Any]) -> Tensor:
        raise NotImplementedError

    def gradient(self, grad: Tensor, kept: dict[Expression, Any], into: dict[int, Tensor]) -> None:
        raise NotImplementedError

    def shifted(self, by: int) -> Expression:
        """Of terms that follow `by` others."""
        raise NotImplementedError


@dataclass(frozen=True)
class Product(Expression):
    term: int = 0

    def value(self, products: Sequence[Tensor], kept: dict[Expression, Any]) -> Tensor:
        return products[self.term]

    def gradient(self, grad: Tensor, kept: dict[Expression, Any], into: dict[int, Tensor]) -> None:
        into[self.term] = grad

    def shifted(self, by: int) -> Expression:
        return Product(self.term + by)


@dataclass(frozen=True)
class _OfOne(Expression):
    of: Expression

    def shifted(self, by: int) -> Expression:
        return replace(self, of=self.of.shifted(by))


@dataclass(frozen=True)
class Scaled(_OfOne):
    """Times a number, or divided by it: they round differently."""

    factor: float
    divided: bool = False

    def value(self, products: Sequence[Tensor], kept: dict[Expression, Any]) -> Tensor:
        return self._scaled(self.of.value(products, kept))

    def gradient(self, grad: Tensor, kept: dict[Expression, Any], into: dict[int, Tensor]) -> None:
        self.of.gradient(self._scaled(grad), kept, into)

    def _scaled(self, x: Tensor) -> Tensor:
        return x / self.factor if self.divided else x * self.factor


@dataclass(frozen=True)
class Tanh(_OfOne):
    def value(self, products: Sequence[Tensor], kept: dict[Expression, Any]) -> Tensor:
        kept[self] = self.of.value(products, kept).tanh()
        return kept[self]

    def gradient(self, grad: Tensor, kept: dict[Expression, Any], into: dict[int, Tensor]) -> None:
        self.of.gradient(torch.ops.aten.tanh_backward(grad, kept[self]), kept, into)


@dataclass(frozen=True)
class Cast(_OfOne):
    dtype: torch.dtype

    def value(self, products: Sequence[Tensor], kept: dict[Expression, Any]) -> Tensor:
        x = self.of.value(products, kept)
        kept[self] = x.dtype
        return x.to(self.dtype)

    def gradient(self, grad: Tensor, kept: dict[Expression, Any], into: dict[int, Tensor]) -> None:
        self.of.gradient(grad.to(kept[self]), kept, into)


@dataclass(frozen=True)
class Sum(Expression):
    """As adapters add theirs, of another dtype perhaps."""

    first: Expression
    second: Expression

    def value(self, products: Sequence[Tensor], kept: dict[Expression, Any]) -> Tensor:
        first, second = self.first.value(products, kept), self.second.value(products, kept)
        kept[self] = first.dtype, second.dtype
        return first + second

    def gradient(self, grad: Tensor, kept: dict[Expression, Any], into: dict[int, Tensor]) -> None:
        for part, dtype in zip((self.first, self.second), kept[self], strict=True):
            part.gradient(grad.to(dtype), kept, into)

    def shifted(self, by: int) -> Expression:
        return Sum(self.first.shifted(by), self.second.shifted(by))


@dataclass(frozen=True, eq=False)
class Logits:
    """`[..., V]`, not computed yet."""

    terms: tuple[Term, ...]
    expression: Expression = Product()

    def then(self, step: Callable[[Expression], Expression]) -> Logits:
        return replace(self, expression=step(self.expression))

    def plus(self, other: Logits) -> Logits:
        expression = Sum(self.expression, other.expression.shifted(len(self.terms)))
        return Logits((*self.terms, *other.terms), expression)

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> Logits:
        """Of other rows: `change` works on their leading dimensions alone."""
        return replace(self, terms=tuple(replace(term, rows=change(term.rows)) for term in self.terms))

    def computed(self, rows: slice = ALL, columns: slice = ALL) -> tuple[Tensor, dict[Expression, Any]]:
        """The logits of some rows and columns, and what their gradient needs."""
        kept: dict[Expression, Any] = {}
        return self.expression.value([term.product(rows, columns) for term in self.terms], kept), kept

    @property
    def vocabulary(self) -> int:
        return self.terms[0].weight.shape[0]

    @property
    def rows(self) -> int:
        return self.terms[0].rows.shape[:-1].numel()

    @property
    def device(self) -> torch.device:
        return self.terms[0].rows.device

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(tensor for term in self.terms for tensor in term.tensors)

    def detached(self) -> Logits:
        return logits_of(self.expression, [None if each is None else each.detach() for each in self.tensors])


def logits_of(expression: Expression, tensors: Sequence[Tensor | None]) -> Logits:
    """From the `tensors` of logits."""
    terms: list[Any] = [tensors[at : at + 3] for at in range(0, len(tensors), 3)]
    return Logits(tuple(Term(*each) for each in terms), expression)
