"""A reward for GRPO that depends on what was written alone."""

from typing import Any


def length(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]
