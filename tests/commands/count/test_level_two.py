"""What does not stay in the L2 between two launches."""

from __future__ import annotations

from npu_patch.commands.count.level_two import LevelTwo


def test_what_was_used_lately_is_there() -> None:
    cache = LevelTwo(size=100)
    assert cache.touched(1, 40, False) == 40
    assert cache.touched(1, 40, False) == 0
    assert cache.touched(1, 60, False) == 20  # more of the same allocation
    assert cache.touched(2, 30, True) == 0 and cache.touched(2, 30, False) == 0


def test_what_was_used_longest_ago_leaves_first_and_is_written_back_if_it_was_changed() -> None:
    cache = LevelTwo(size=100)
    cache.touched(1, 40, True)
    cache.touched(2, 40, False)
    assert cache.touched(3, 50, False) == 50 + 40
    assert cache.touched(2, 40, False) == 0
    assert cache.touched(1, 40, False) == 40


def test_what_is_larger_than_the_cache_is_never_there() -> None:
    cache = LevelTwo(size=100)
    for _ in range(2):
        assert cache.touched(1, 101, False) == cache.touched(1, 101, True) == 101


def test_what_is_given_its_place_later_is_there_under_its_new_name_alone() -> None:
    cache = LevelTwo(size=100)
    cache.touched(1, 60, True)
    cache.touched(2, 30, False)
    cache.renamed(1, 2)
    assert cache.touched(2, 60, False) == 0
    assert cache.touched(3, 40, False) == 40  # and there was room for it
    assert cache.touched(1, 60, False) == 60 + 60  # whose place was written
