"""A clock for tests: each way is run once, and takes what it is said to take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from npu_patch.serving.case import Clock, Measured


def made_up(seconds: Callable[[Callable[[], Any]], float]) -> Clock:
    """`seconds(form)` runs a way and says what it took."""

    def clock(forms: Mapping[str, Callable[[], Any]]) -> dict[str, Measured]:
        return {name: Measured(seconds=seconds(form)) for name, form in forms.items()}

    return clock
