"""The first prompts of an engine, between two looks at all of them."""

from dataclasses import dataclass

import pytest

from tempo_router.first_prompts import FirstPrompts


@dataclass(frozen=True)
class Prompt:
    ticket: int


def ranked(*keys: float, are_all: bool) -> FirstPrompts:
    """Prompts 1, 2, ... with these keys."""
    first = FirstPrompts()
    first.rank([Prompt(n) for n in range(1, len(keys) + 1)], keys, are_all=are_all)  # type: ignore[arg-type,misc]
    return first


def tickets(first: FirstPrompts) -> list[int]:
    return [call.ticket for call in first.calls]


@pytest.mark.parametrize(("key", "expected"), [(0.0, [9, 1, 2]), (1.0, [1, 9, 2]), (1.5, [1, 9, 2])])
def test_a_newcomer_stands_by_its_key_and_behind_its_equals(key: float, expected: list[int]):
    first = ranked(1.0, 2.0, are_all=False)
    first.insert(Prompt(9), key)  # type: ignore[arg-type]
    assert tickets(first) == expected


@pytest.mark.parametrize(("are_all", "expected"), [(True, [1, 2, 9]), (False, [1, 2])])
def test_who_comes_behind_the_last_is_among_the_first_only_if_these_are_all(are_all: bool, expected: list[int]):
    """Otherwise others may stand between the two."""
    first = ranked(1.0, 2.0, are_all=are_all)
    first.insert(Prompt(9), 3.0)  # type: ignore[arg-type]
    assert tickets(first) == expected


def test_the_first_are_known_until_too_many_have_left():
    first = ranked(1.0, 2.0, 3.0, are_all=False)
    assert first.are_known(3)
    first.note_gone()
    assert (first.are_known(2), first.are_known(3)) == (True, False)


def test_all_prompts_are_known_however_many_have_left():
    first = ranked(1.0, are_all=True)
    first.note_gone()
    assert first.are_known(5)


def test_nothing_is_known_of_a_choice_or_after_a_return():
    """Who comes back may stand among the first already."""
    first = ranked(1.0, are_all=True)
    first.note_return()
    assert not first.are_known(0)

    first.rank([], [], are_all=True)
    assert first.are_known(1)
    first.choose([])
    assert not first.are_known(0)


def test_who_has_left_is_dropped_once_there_are_several():
    first = ranked(*range(20), are_all=False)
    for _ in range(17):
        first.note_gone()
    first.drop_gone(lambda call: call.ticket > 17)
    assert tickets(first) == [18, 19, 20]
    assert (first.are_known(3), first.are_known(4)) == (True, False)
    first.insert(Prompt(21), 18.5)  # type: ignore[arg-type]
    assert tickets(first) == [18, 19, 21, 20]
