"""Several implementations behind one replacement: each call goes to the first that takes it and has proved itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from npu_patch.numerics.selective_checkpointing import unseen
from npu_patch.ops.gated_delta.op import OWN
from npu_patch.serving.calls import Calls
from npu_patch.serving.implementation import Implementation
from npu_patch.serving.replacement import Unserved


class Chain:
    """`implementations` in order of preference; `why_wrong(implementation, call)` checks one before its first use.

    Who ran how often, and why another one was passed over last, is counted in `calls`.
    """

    def __init__(
        self,
        implementations: Sequence[Implementation],
        device_type: str,
        why_wrong: Callable[[Implementation, Any], str | None],
    ) -> None:
        serving = (each for each in implementations if device_type in each.device_types)
        self.implementations = [each for each in serving if each.missing() is None]
        self.why_wrong = why_wrong

    def run(self, call: Any, calls: Calls) -> Any | Unserved:
        reason = "no implementation"
        for implementation in self.implementations:
            reason = implementation.unsupported(call)
            if reason is None and implementation.name != OWN:
                reason = self.why_wrong(implementation, call)
            if reason is None:
                calls.ran_by[implementation.name] += 1
                with unseen():  # the own ones write into what they computed
                    return implementation.run(call)
            calls.declined[implementation.name] = reason
        return Unserved(reason)
