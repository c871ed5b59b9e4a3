"""Which implementation serves each call at a site. One `Dispatch` for each site, whatever decides there:

    fixed      the first that serves the device
    measured   an optional one (a Triton kernel) for the sizes at which it was faster, or wherever it can, if forced
    checked    none that was found wrong on this device for such a call: the next one, or the original
    proven     several providers in order, each of which has to prove itself before its first use
    tuned      for the shapes in a tuning file what that says, before all else

What may depend on a call is its key, the sizes and dtypes that decide; what was never measured is served as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, Generic

import torch

from npu_patch.numerics.room import quiet_room
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import ACCIDENTS, Case, Measured
from npu_patch.serving.implementation import Call, Choice, Implementation, Result, choose
from npu_patch.serving.op import Op
from npu_patch.serving.signature import Signature, signature_of
from npu_patch.sites.sites import LiveModules

NO_MODEL = "no model was given: nothing was measured yet"
NO_LAYERS = "nothing was measured: the given model has no such layer"
TUNED = "tuned: "  # what a tuning file decides begins with, for the report


def no_cases(live: LiveModules) -> Iterable[Case[Call, Result]]:
    return ()


def contenders(case: Case[Call, Result], choice: Choice[Call, Result]) -> tuple[Implementation[Call, Result], ...]:
    """The optional implementations that times may choose for a case."""
    if choice.forced or case.timed_tokens == 0:
        return ()
    return tuple(each for each in choice.candidates if case.why_not_by(each) is None)


@dataclass(frozen=True)
class Verdict(Generic[Call, Result]):
    """Of one case: the optional implementation that is taken, or None, and what was measured of each one; of the usual
    one just whether it is right, where there is no other."""

    case: Case[Call, Result]
    taken: Implementation[Call, Result] | None
    usual: str
    measured: Mapping[str, Measured]

    @property
    def wrong(self) -> dict[str, str]:
        """By name, what was found of those that are wrong."""
        found = ((name, each.wrong) for name, each in self.measured.items())
        return {name: f"{self.case.name}: {why}" for name, why in found if why is not None and why not in ACCIDENTS}

    def words(self, name: str) -> str:
        """What was measured of the optional implementation `name`, beside the usual one."""
        mine, other = self.measured[name], self.measured[self.usual]
        if mine.wrong is not None:
            return mine.wrong
        near = mine.seconds is not None and other.seconds is not None and mine.seconds < other.seconds
        close = ", not clearly faster" if near and not mine.clearly_faster_than(other) else ""
        return f"{_milliseconds(mine)} against {_milliseconds(other)}{close}"


@dataclass
class Dispatch(Generic[Call, Result]):
    """Of one site. `cases(live)` yields what to measure for a model's layers, `verdicts` are those that were, by key;
    `faster`: the optional ones that go first, by key; `asked` whether a model was ever looked at. `wrong`: of
    implementations that were found wrong, by name and key, how far. `unproven(implementation, *call)`: why one has not
    proved itself for such a call, if it has to. `tuned`: by the signature of a call, its implementation, or why it is
    the original's, or None where it is served as usual; `tuned_words`: the same for the report."""

    op: Op[Call, Result]
    choice: Choice[Call, Result]
    cases: Callable[[LiveModules], Iterable[Case[Call, Result]]] = no_cases
    unproven: Callable[Concatenate[Implementation[Call, Result], Call], str | None] | None = None
    # Not mapping proxies: to the compiler, each dict that a model writes to later may be what one stands for.
    verdicts: Mapping[Hashable, Verdict[Call, Result]] = field(default_factory=dict)
    faster: Mapping[Hashable, Implementation[Call, Result]] = field(default_factory=dict)
    wrong: Mapping[tuple[str, Hashable], str] = field(default_factory=dict)
    asked: bool = False
    tuned: Mapping[Signature, Implementation[Call, Result] | str | None] = field(default_factory=dict)
    tuned_words: str = ""

    @property
    def idle(self) -> bool:
        """Whether nothing serves any call: there are candidates only, and none was measured or tuned to be faster."""
        return self.choice.chosen is None and not self.takes_any

    @property
    def timed(self) -> bool:
        """Whether times decide what serves it."""
        return bool(self.choice.candidates) and not self.choice.forced

    @property
    def takes_any(self) -> bool:
        """Whether an optional implementation may serve a call."""
        return bool(self.choice.forced or self.faster or self.tuned)

    if TYPE_CHECKING:

        def serving(self, calls: Calls, *call: Call.args, **none: Call.kwargs) -> Implementation[Call, Result] | str:
            """The implementation for one call, asked with `unsupported(*call)`; or why none takes it."""

    else:  # without `**`, for which each call would make a dict

        def serving(self, calls, *call):
            choice, usual = self.choice, self.choice.chosen
            candidates = choice.candidates and (choice.forced or self.faster)
            if usual is None or candidates or self.wrong or self.unproven is not None or self.tuned:
                return self._first_of_several(calls, call)
            reason = usual.unsupported(*call)
            if reason is not None:
                return reason
            if choice.candidates and not torch.compiler.is_compiling():
                calls.ran_by[usual.name] += 1
            return usual

    def _first_of_several(self, calls: Calls, call: tuple[Any, ...]) -> Implementation[Call, Result] | str:
        op: Op[..., Result] = self.op
        unproven: Callable[..., str | None] | None = self.unproven
        usual, forced = self.choice.chosen, self.choice.forced and not self.wrong
        key = None if forced else op.key(*call)  # nothing depends on it
        counted = not torch.compiler.is_compiling()
        order = self._preferred(key) if usual is None else (*self._preferred(key), usual)
        if counted and self.tuned and (signature := signature_of(*call)) in self.tuned:
            calls.tuned += 1
            decided = self.tuned[signature]
            if isinstance(decided, str):
                return decided
            order = order if decided is None else (decided,)
        reason = "no implementation"
        for implementation in order:
            unsupported: Callable[..., str | None] = implementation.unsupported
            why = (self.why_wrong(implementation.name, key) if self.wrong else None) or unsupported(*call)
            if why is None and unproven is not None and implementation is not usual:
                why = unproven(implementation, *call)
            if why is None:
                if counted and (self.choice.candidates or unproven is not None or implementation is not usual):
                    calls.ran_by[implementation.name] += 1
                return implementation
            reason = why
            if counted and implementation is not usual:
                calls.declined[implementation.name] = reason
        return reason

    def why_wrong(self, name: str, key: Hashable) -> str | None:
        """What was found wrong of an implementation for such calls, or None."""
        found = self.wrong.get((name, key))
        return None if found is None else f"{name} is wrong on this device: {found}"

    def _preferred(self, key: Hashable) -> tuple[Implementation[Call, Result], ...]:
        if not self.choice.candidates:
            return ()
        if self.choice.forced:
            return self.choice.candidates
        taken = self.faster.get(key)
        return () if taken is None else (taken,)

    @property
    def tuned_to(self) -> tuple[Implementation[Call, Result], ...]:
        """Those that a tuning file chooses, beside what the choice has."""
        others = [each for each in self.tuned.values() if isinstance(each, Implementation)]
        known = (self.choice.chosen, *self.choice.candidates)
        return tuple({each.name: each for each in others if each not in known}.values())

    def undecided(self, live: LiveModules, checked: bool) -> dict[Hashable, Case[Call, Result]]:
        """The cases of `live` that a decision still waits for, by key. `checked`: implementations are, where no times
        decide either."""
        self.asked = True
        if not (checked or self.timed):
            return {}
        found: dict[Hashable, Case[Call, Result]] = {}
        with quiet_room():
            for case in self.cases(live):
                if checked or contenders(case, self.choice):
                    found.setdefault(case.key(), case)  # the first: others may be served as it is
        return {key: case for key, case in found.items() if key not in self.verdicts}

    def name(self) -> str:
        """For the report: what serves the site."""
        usual = self.choice.chosen.name if self.choice.chosen is not None else "the original"
        if self.choice.forced and self.choice.candidates:
            return self.choice.candidates[0].name
        taken = [(each, each.taken.name) for each in self.verdicts.values() if each.taken is not None]
        if not taken:
            wrong = [key for key in self.verdicts if (usual, key) in self.wrong]
            return "the original" if wrong and len(wrong) == len(self.verdicts) else usual
        several = len(self.verdicts) > 1
        parts = [
            f"{its_name} ({f'{each.case.name}: ' if several else ''}{each.words(its_name)})" for each, its_name in taken
        ]
        return ", ".join(parts if len(taken) == len(self.verdicts) else [*parts, usual])

    def declined(self) -> dict[str, str]:
        """For the report: why each other implementation does not serve the site, or not all of its calls."""
        found = dict(self.choice.declined)
        for name in dict.fromkeys(name for name, _ in self.wrong):
            found[name] = "; ".join(why for (each, _), why in self.wrong.items() if each == name)
        if not self.timed:
            return found
        for candidate in self.choice.candidates:
            measured = [each for each in self.verdicts.values() if candidate.name in each.measured]
            others = [each for each in measured if each.taken is not candidate]
            if others:
                found[candidate.name] = "; ".join(f"{each.case.name}: {each.words(candidate.name)}" for each in others)
            elif not measured:
                found[candidate.name] = NO_LAYERS if self.asked else NO_MODEL
        return found


AnyDispatch = Dispatch[..., Any]
AnyVerdict = Verdict[..., Any]


def _milliseconds(measured: Measured) -> str:
    return measured.wrong or f"{(measured.seconds or 0.0) * 1e3:.3g} ms"


def in_order(
    op: Op[Call, Result],
    device_type: str,
    unproven: Callable[Concatenate[Implementation[Call, Result], Call], str | None],
    optional: bool = False,
    source: str = "default",
) -> Dispatch[Call, Result]:
    """Of providers, the last of which needs no proof and takes every call that any can take. `optional`: whether
    optional ones are among them, as `source` says."""
    serving = (each for each in op.implementations if device_type in each.device_types)
    found = [each for each in serving if (optional or not each.optional) and each.missing() is None]
    declined = choose(op.implementations, device_type, optional, source).declined
    choice = Choice(found[-1] if found else None, declined, tuple(found[:-1]), forced=True)
    return Dispatch(op, choice, unproven=unproven)
