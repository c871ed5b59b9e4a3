"""How far one model's logits are from another's, and what both say of a text; summed up piece by piece."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 64  # of logits that are looked at together in float32


@dataclass
class LogitsError:
    """Sums over tokens. Logits count less the mean of their row, which no softmax sees.

    KL divergences are those from the original's distribution, in nats.
    """

    tokens: int = 0
    predicted: int = 0
    squares: float = 0.0
    values: int = 0
    error_squares: float = 0.0
    largest: float = 0.0
    agreeing: int = 0
    kl: float = 0.0
    largest_kl: float = 0.0
    original_surprise: float = 0.0
    surprise: float = 0.0
    finite: bool = True
    original_finite: bool = True

    def add(self, original: Tensor, found: Tensor, ids: Tensor) -> None:
        """Logits `[T, V]` of each model for the tokens `[T]`, each of which the one before predicts."""
        following = torch.cat([ids[1:], ids.new_full((1,), -1)])
        parts = (original.split(ROWS), found.split(ROWS), following.split(ROWS))
        for expected, got, after in zip(*parts, strict=True):
            self._add(expected.float(), got.float(), after)

    def _add(self, original: Tensor, found: Tensor, following: Tensor) -> None:
        self.finite = self.finite and bool(found.isfinite().all())
        self.original_finite = self.original_finite and bool(original.isfinite().all())
        centred = original - original.mean(-1, keepdim=True)
        error = found - found.mean(-1, keepdim=True) - centred
        self.tokens += len(original)
        self.values += original.numel()
        self.squares += float(centred.square().sum())
        self.error_squares += float(error.square().sum())
        self.largest = _larger(self.largest, float(error.abs().max()))
        self.agreeing += int((original.argmax(-1) == found.argmax(-1)).sum())
        expected, got = original.log_softmax(-1), found.log_softmax(-1)
        kl = (expected.exp() * (expected - got)).sum(-1)
        self.kl += float(kl.sum())
        self.largest_kl = _larger(self.largest_kl, float(kl.max()))
        known = following >= 0
        at = following[known, None]
        self.predicted += int(known.sum())
        self.original_surprise -= float(expected[known].gather(-1, at).sum())
        self.surprise -= float(got[known].gather(-1, at).sum())

    @property
    def relative(self) -> float:
        """Root mean square of the error, relative to that of the original's logits."""
        return relative_error(self.error_squares, self.squares)

    @property
    def largest_relative(self) -> float:
        """Of a single logit, relative to the root mean square of the original's."""
        return self.largest / max(math.sqrt(self.squares / self.values), 1e-30)

    @property
    def original_perplexity(self) -> float:
        return _exp(self.original_surprise / self.predicted)

    @property
    def perplexity(self) -> float:
        return _exp(self.surprise / self.predicted)

    @property
    def perplexity_ratio(self) -> float:
        return _exp((self.surprise - self.original_surprise) / self.predicted)


def _larger(one: float, other: float) -> float:
    """NaN where the other is."""
    return other if math.isnan(other) or other > one else one


def relative_error(error_squares: float, squares: float) -> float:
    """Of sums of squares."""
    return math.sqrt(error_squares / squares) if squares > 0 else (0.0 if error_squares == 0 else math.inf)


def _exp(value: float) -> float:
    return math.exp(value) if not value > 700 else math.inf
