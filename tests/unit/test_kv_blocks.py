"""Blocks of the KV cache: live calls come first, what ended calls left behind has what is over."""

from tempo_router.kv_blocks import KvBlocks


def kv(blocks: int = 10) -> KvBlocks:
    return KvBlocks(blocks, 16)


def test_a_call_fills_whole_blocks():
    assert [kv().blocks_for(tokens) for tokens in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_what_is_taken_is_held_until_it_is_given_back():
    cache = kv()

    assert cache.take(7)
    assert (cache.held, cache.free, cache.free_tokens) == (7, 3, 48)
    cache.give_back(7)
    assert (cache.held, cache.free) == (0, 10)


def test_more_than_there_is_is_not_given_and_changes_nothing():
    cache = kv()
    cache.keep("chain", 64)
    assert cache.take(6)

    assert not cache.take(5)
    assert cache.held == 6
    assert cache.cached_tokens("chain", 64) == 64
    cache.audit()


def test_a_prefix_is_shared_in_whole_blocks_and_not_beyond_what_both_have():
    cache = kv()
    cache.keep("chain", 70)

    assert cache.cached_tokens("chain", 1000) == 64
    assert cache.cached_tokens("chain", 40) == 32
    assert cache.cached_tokens("chain", 15) == 0
    assert cache.cached_tokens("stranger", 1000) == 0


def test_a_cached_prefix_gives_way_to_a_live_call_the_one_used_longest_ago_first():
    cache = kv()
    cache.keep("old", 64)
    cache.keep("new", 64)
    cache.use("old", 32)

    assert cache.free == 10, "cached blocks count as free"
    assert cache.take(5)
    assert (cache.cached_tokens("old", 64), cache.cached_tokens("new", 64)) == (64, 0)
    assert cache.take(5)
    assert cache.cached_tokens("old", 64) == 0
    cache.audit()


def test_a_live_call_never_gives_way_to_a_prefix():
    cache = kv()
    assert cache.take(8)
    cache.keep("long", 48)
    cache.keep("short", 32)

    assert cache.cached_tokens("long", 48) == 0
    assert cache.cached_tokens("short", 32) == 32
    assert cache.held == 8
    cache.audit()


def test_a_call_that_reads_an_entry_whole_takes_its_place():
    cache = kv()
    cache.keep("chain", 64)

    assert cache.use("chain", 64) == 64
    assert cache.cached_tokens("chain", 64) == 0, "its blocks are the call's now and are not counted twice"
    cache.keep("chain", 96)
    assert cache.cached_tokens("chain", 1000) == 96
    cache.audit()


def test_the_longest_context_of_a_prefix_is_kept():
    cache = kv()
    cache.keep("chain", 80)
    cache.keep("chain", 32)

    assert cache.cached_tokens("chain", 1000) == 80
    cache.keep("chain", 128)
    assert cache.cached_tokens("chain", 1000) == 128
    cache.audit()


def test_less_than_a_block_is_not_kept():
    cache = kv()
    cache.keep("tiny", 15)

    assert cache.cached_tokens("tiny", 1000) == 0
    cache.audit()
