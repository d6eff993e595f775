"""Who takes part with which LoRA adapter, and who waits."""

import random

import pytest

from workers.lora_places import LoraPlaces


@pytest.fixture
def loras() -> LoraPlaces[str]:
    return LoraPlaces(2, most_passed=3)


def enter(loras: LoraPlaces[str], **adapters: int) -> list[bool]:
    return [loras.enter(name, adapter, name) for name, adapter in adapters.items()]


def test_one_adapter_too_many_waits_until_all_calls_of_another_have_ended(loras):
    assert enter(loras, a=1, b=2, c=1, d=3) == [True, True, True, False]
    loras.leave("a")
    assert loras.admit() == []
    loras.leave("c")
    assert loras.admit() == ["d"]
    assert loras.waiting == []


def test_a_place_goes_to_the_longest_wait_and_whoever_shares_its_adapter_comes_along(loras):
    enter(loras, a=1, b=2, c=3, d=4, e=3)
    loras.leave("b")
    assert loras.admit() == ["c", "e"]
    assert loras.waiting == ["d"]


def test_a_newcomer_does_not_take_the_place_of_one_that_waits(loras):
    enter(loras, a=1, b=2, c=3)
    loras.leave("a")
    assert enter(loras, late=4) == [False]
    assert loras.admit() == ["c"]


def test_only_so_many_newcomers_pass_one_that_waits(loras):
    enter(loras, a=1, b=2, c=3)
    assert enter(loras, p=1, q=2, r=1, s=1) == [True, True, True, False]
    for name in "apr":
        loras.leave(name)
    assert loras.admit() == ["c"]
    assert loras.waiting == ["s"], "adapter 1 has lost its place to adapter 3"


def test_when_the_first_of_the_line_gives_up_others_need_not_wait_for_it(loras):
    enter(loras, a=1, b=2, c=3, p=1, q=1, r=1, s=1)
    assert loras.waiting == ["c", "s"]
    loras.leave("c")
    assert loras.admit() == ["s"]


def test_a_call_without_adapter_leaves_in_peace(loras):
    loras.leave("nobody")
    loras.audit()


@pytest.mark.parametrize("seed", range(20))
def test_whatever_comes_and_goes_there_are_never_too_many_and_nobody_waits_for_ever(seed):
    rng = random.Random(seed)
    loras: LoraPlaces[str] = LoraPlaces(rng.choice((1, 2, 3)), most_passed=rng.choice((0, 1, 5)))
    taking_part: list[str] = []
    for number in range(300):
        name = f"r{number}"
        if loras.enter(name, rng.randrange(1, 6), name):
            taking_part.append(name)
        for crowd in (taking_part, loras.waiting):
            if crowd and rng.random() < 0.4:
                gone = rng.choice(crowd)
                loras.leave(gone)
                taking_part = [one for one in taking_part if one != gone]
        taking_part += loras.admit()
        loras.audit()
    while taking_part:
        loras.leave(taking_part.pop())
        taking_part += loras.admit()
        loras.audit()
    assert loras.waiting == []
