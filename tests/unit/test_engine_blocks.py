"""A planner's count of blocks, corrected by the engine's own."""

from workers.engine_blocks import EngineBlocks


def test_the_engine_knows_better_what_is_free():
    kv = EngineBlocks(100, 16, lambda _: 0)
    assert kv.take(40)
    kv.measure(90)  # most of it is shared with others
    assert kv.free == 90
    kv.take(10)
    assert kv.free == 80
    kv.give_back(50)
    assert kv.free == 130
    kv.measure(100)
    assert kv.free == 100


def test_a_call_of_an_engine_with_several_kinds_of_layers_takes_several_blocks_for_one_of_ours():
    """How many, with sliding windows, is what those that run take now; within what one call can take."""
    kv = EngineBlocks(100, 16, lambda _: 0, least_each=1.25, most_each=3.0)
    kv.measure(100)
    assert kv.free == 80
    kv.take(20)
    kv.measure(60)
    assert kv.free == 30
    kv.measure(60, promised=10)
    assert kv.free == 10, "ten blocks of ours hold 40 of the engine's, but three each at most"
    kv.measure(95)
    assert kv.free == 76


def test_what_the_engine_keeps_from_prompts_is_there_for_decodes():
    kv = EngineBlocks(100, 16, lambda _: 0)
    kv.take(60)
    kv.measure(40, spare=30)
    assert kv.free == 10
    kv.measure(20, spare=30, for_decodes=4)
    assert kv.free == 4
    kv.measure(3, spare=30, for_decodes=4)
    assert kv.free == 3


def test_a_cached_prefix_is_what_the_engine_has_of_that_request():
    kv = EngineBlocks(100, 16, {"r": 64}.__getitem__)
    assert kv.use("r", 200) == 64
    assert kv.use("r", 50) == 50


def test_blocks_that_others_hold_too_need_not_be_free_and_do_not_become_free():
    kv = EngineBlocks(100, 16, lambda _: 0, {"r": 40}.__getitem__)
    kv.measure(30)
    assert kv.shared("r") == 40
    kv.take(50)
    kv.share(40)
    assert kv.free == 20
    kv.give_back(50)
    kv.share(-40)
    assert kv.free == 30
