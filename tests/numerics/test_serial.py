"""Numbers of objects: one each, for ever, and nothing is kept alive."""

from __future__ import annotations

import weakref

from npu_patch.numerics.serial import serial


class Thing:
    def method(self) -> None:
        pass


def test_an_object_keeps_its_number_and_no_later_one_has_it() -> None:
    numbers, addresses = set(), set()
    for _ in range(50):
        thing = Thing()
        assert serial(thing) == serial(thing)
        numbers.add(serial(thing))
        addresses.add(id(thing))
        del thing
    assert len(numbers) == 50 > len(addresses)


def test_nothing_is_kept_alive() -> None:
    thing = Thing()
    gone = weakref.ref(thing)
    serial(thing), serial(thing.method)
    del thing
    assert gone() is None


def test_a_bound_method_is_the_same_at_each_look_and_another_object_s_is_not() -> None:
    one, other = Thing(), Thing()
    assert serial(one.method) == serial(one.method) != serial(other.method)
