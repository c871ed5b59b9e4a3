"""What a value that waits is to those who are not its partner.

A replacement returns it in place of a tensor, and its partner, the replacement that computes both together, knows its
kind and takes it. Everybody else, whether they look on or use it, needs no more than this. Some kinds are tensors by
`_make_wrapper_subclass`, and torch tells them what is done with them; the others hear of it by themselves.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Abandoned(Exception):
    """What waits cannot be had by itself: the layer that put it off runs anew without."""


class Waiting:
    """A base class and no Protocol, whose metaclass no tensor can have."""

    __slots__ = ()

    @property
    def settled(self) -> bool:
        """Whether the waiting is over: the partner took it, or somebody else used it."""
        raise NotImplementedError

    def peek(self) -> Tensor | None:
        """For who looks on: it goes on waiting, and nothing is counted. The tensor that it stands for, or one that
        waits for the same by itself; None for what means nothing outside its call. Not to be written to."""
        raise NotImplementedError

    def materialise(self, used_by: str) -> Tensor:
        """For who uses it and is not the partner: the tensor that the original would have made, each time the same one.
        The waiting is over, and where that costs the fused operator, `used_by` is in the reason that the report has.

        Raises:
            Abandoned: where there is no such tensor; `used_by` is in its reason.
        """
        raise NotImplementedError


class AskedAlone:
    """Of a tensor that waits, before torch's class: what torch tells a subclass nothing of is asked of the tensor that
    it stands for, by itself."""

    __slots__ = ()

    def _alone(self, used_by: str) -> Any:
        raise NotImplementedError

    def numpy(self, *, force: bool = False) -> Any:
        return self._alone("numpy").numpy(force=force)

    def tolist(self) -> Any:
        return self._alone("tolist").tolist()

    def data_ptr(self) -> int:
        found: int = self._alone("data_ptr").data_ptr()
        return found

    def untyped_storage(self) -> Any:
        return self._alone("untyped_storage").untyped_storage()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._alone("numpy").__array__(*args, **kwargs)

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._alone("dlpack").__dlpack__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._alone("pickle").__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return self._alone("deepcopy").__deepcopy__(memo)


def materialised(value: Any, used_by: str, kind: type[Waiting] = Waiting) -> Any:
    """`value` with the tensors that what waits in it stands for."""
    if isinstance(value, kind):
        return value.materialise(used_by)
    if type(value) in (tuple, list):
        return type(value)(materialised(each, used_by, kind) for each in value)
    if type(value) is dict:
        return {key: materialised(each, used_by, kind) for key, each in value.items()}
    return value


def name_of(function: Any) -> str:
    """Of what torch is asked to do with it, for `used_by`."""
    return getattr(function, "__name__", str(function))
