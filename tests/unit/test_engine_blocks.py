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


def test_a_cached_prefix_is_what_the_engine_has_of_that_request():
    kv = EngineBlocks(100, 16, {"r": 64}.__getitem__)
    assert kv.use("r", 200) == 64
    assert kv.use("r", 50) == 50
