"""The journal: the only place that rebinds anything, and the place that puts everything back.

An entry remembers an owner, a name and the very object that stood there, read from the owner's own namespace (never
through inheritance or descriptors), so that undoing restores identity, not equality. Owners are modules, classes,
live instances, mappings and the cells of closures. Instances are held weakly, so that a patched model can be freed,
except while the object that stood there holds its instance itself (a bound method, as accelerate's hooks leave behind).

What somebody else bound over a rebinding is theirs, and stays when that is undone.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from types import CellType, MethodType, ModuleType
from typing import Any

from npu_patch import log
from npu_patch.sites.whose import whose

_ABSENT = object()
_changes = 0  # of all journals


def changes() -> int:
    """How often anything was bound anew or put back in this process: who keeps what was made of it asks whether that
    still holds."""
    return _changes


@dataclass(frozen=True)
class Entry:
    """One rebinding. `owner()` is None once a weakly held owner is gone."""

    owner: Callable[[], Any]
    name: Any
    before: Any
    new: Any
    on_undo: Callable[[], None] | None
    label: str = ""  # for people


class Journal:
    """An ordered list of rebindings that can be undone, in reverse, to any earlier point."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._entries: list[Entry] = []
        self._held: dict[tuple[int, Any], list[Entry]] = {}  # by (id of the owner, name), checked by identity

    def __len__(self) -> int:
        return len(self._entries)

    def rebind(
        self, owner: Any, name: Any, new: Any, on_undo: Callable[[], None] | None = None, label: str = ""
    ) -> None:
        """Binds `name` in `owner`'s own namespace to `new`. `on_undo` runs after the old object is back. `label`: what
        the place is called, where owner and name do not say it."""
        with self.lock:
            label = label or f"{_label(owner)}.{name}"
            entry = Entry(_reference(owner), name, _read(owner, name), _core(new), on_undo, label)
            _write(owner, name, new)
            _count()
            self._entries.append(entry)
            self._held.setdefault((id(owner), name), []).append(entry)

    def insert(self, sequence: list[Any], new: Any) -> None:
        """Puts `new` first in `sequence` (an import hook in `sys.meta_path`, say) until it is undone."""
        with self.lock:
            self._entries.append(Entry(lambda: None, None, None, None, lambda: _remove_identical(sequence, new)))
            sequence.insert(0, new)

    def changed(self, owner: Any, name: str, change_back: Callable[[Any], None]) -> None:
        """Notes a change of `owner` that is no rebinding, made already; `change_back(owner)` undoes it."""
        reference = _reference(owner)

        def undo() -> None:
            present = reference()
            if present is not None:
                change_back(present)

        with self.lock:
            self._entries.append(Entry(lambda: None, name, None, None, undo))

    def holds(self, owner: Any, name: Any) -> bool:
        """Whether `name` in `owner` is bound by this journal now."""
        with self.lock:
            return any(entry.owner() is owner for entry in self._held.get((id(owner), name), ()))

    def mark(self) -> int:
        """A point that `undo_to` can return to."""
        return len(self._entries)

    def undo_to(self, mark: int) -> None:
        """Undoes every rebinding made since `mark`, the last one first; one that fails does not stop the rest."""
        errors = []
        with self.lock:
            while len(self._entries) > mark:
                entry = self._entries.pop()
                _count()
                self._forget(entry)
                try:
                    _undo(entry)
                except Exception as error:
                    errors.append(f"{entry.label or entry.name}: {error}")
        if errors:
            raise RuntimeError("could not be restored: " + "; ".join(errors))

    def _forget(self, entry: Entry) -> None:
        for key, entries in list(self._held.items()):
            if entry in entries:
                entries.remove(entry)
                if not entries:
                    del self._held[key]
                return

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing: an exception inside undoes what was rebound inside, and goes on."""
        with self.lock:
            mark = self.mark()
            try:
                yield
            except BaseException:
                self.undo_to(mark)
                raise


def _count() -> None:
    global _changes
    _changes += 1


def _undo(entry: Entry) -> None:
    owner = entry.owner()
    if owner is not None:
        present = _read(owner, entry.name)
        if _core(present) is entry.new:
            _write(owner, entry.name, entry.before)
        elif present is not entry.before:
            what = "removed by somebody else" if present is _ABSENT else f"bound anew by {whose(present)}"
            log.warning(f"{entry.label} was {what}: restore() leaves it so")
    if entry.on_undo is not None:
        entry.on_undo()


def _core(value: Any) -> Any:
    """A bound method without its instance, which an entry must not keep alive; anything else as it is."""
    return value.__func__ if isinstance(value, MethodType) else value


def _label(owner: Any) -> str:
    return getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__name__


def _reference(owner: Any) -> Callable[[], Any]:
    if isinstance(owner, (type, ModuleType, MutableMapping, CellType)):
        return lambda: owner
    return weakref.ref(owner)


def _read(owner: Any, name: Any) -> Any:
    if isinstance(owner, MutableMapping):
        return owner.get(name, _ABSENT)
    if isinstance(owner, CellType):
        return owner.cell_contents
    return vars(owner).get(name, _ABSENT)


def _write(owner: Any, name: Any, value: Any) -> None:
    if isinstance(owner, MutableMapping):
        _write_item(owner, name, value)
    elif isinstance(owner, CellType):
        owner.cell_contents = value
    elif isinstance(owner, (type, ModuleType)):
        if value is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
    else:  # a live instance: straight into its namespace, past nn.Module.__setattr__ and accelerate's wrappers
        _write_item(vars(owner), name, value)


def _write_item(mapping: MutableMapping[Any, Any], name: Any, value: Any) -> None:
    if value is _ABSENT:
        mapping.pop(name, None)
    else:
        mapping[name] = value


def _remove_identical(sequence: list[Any], item: Any) -> None:
    for index, present in enumerate(sequence):
        if present is item:
            del sequence[index]
            return
