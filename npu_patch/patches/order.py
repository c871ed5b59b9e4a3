"""The order of a catalogue: a patch comes after those that it builds on."""

from __future__ import annotations

from collections.abc import Iterable

from npu_patch.patches.patch import Patch


def in_order(patches: Iterable[Patch]) -> tuple[Patch, ...]:
    """As they are given, but for those that have to wait for what they need.

    Raises:
        ValueError: where two have one name, a patch needs one that is not there, or some need each other.
    """
    waiting = list(patches)
    names = [patch.name for patch in waiting]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two patches are called {name!r}")
    for patch in waiting:
        for name in patch.needs:
            if name not in names:
                raise ValueError(f"patch {patch.name!r} needs {name!r}; there are {', '.join(names)}")
    ordered: dict[str, Patch] = {}
    while waiting:
        ready = next((patch for patch in waiting if ordered.keys() >= set(patch.needs)), None)
        if ready is None:
            raise ValueError(f"patches that wait for each other: {', '.join(patch.name for patch in waiting)}")
        ordered[ready.name] = ready
        waiting.remove(ready)
    return tuple(ordered.values())
