"""Which prompts begin alike, and which chats go on."""

import random

from deployments.prefix_growth import BLOCK_TOKENS, GrowingChats, SharedPrefixes


def test_a_prompt_that_continues_another_shares_its_whole_blocks():
    prefixes = SharedPrefixes()
    first = list(range(300))
    name, shared = prefixes.note("t", first)
    assert (bool(name), shared) == (True, 0)
    assert prefixes.note("t", [*first, *range(1000, 1100)]) == (name, 300 // BLOCK_TOKENS * BLOCK_TOKENS)
    assert prefixes.note("t", first[:130]) == (name, 128)


def test_equal_prompts_of_two_tenants_share_nothing():
    prefixes = SharedPrefixes()
    mine, _ = prefixes.note("mine", range(100))
    theirs, shared = prefixes.note("theirs", range(100))
    assert mine != theirs
    assert shared == 0


def test_a_block_counts_only_after_all_that_came_before_it():
    prefixes = SharedPrefixes()
    prefixes.note("t", range(128))
    other = [7, *range(1, 128)]
    assert prefixes.note("t", other)[1] == 0


def test_short_prompts_have_no_name_and_memory_is_bounded():
    assert SharedPrefixes().note("t", range(63)) == ("", 0)
    prefixes = SharedPrefixes(most=10)
    rng = random.Random(1)
    for _ in range(50):
        prefixes.note("t", [rng.randrange(1000) for _ in range(200)])
    assert len(prefixes._line_of) <= 10


def test_a_chat_that_grows_is_one_chat_and_a_fork_stays_with_it():
    chats = GrowingChats()
    name = chats.name("t", [b"system", b"hello"])
    assert chats.name("t", [b"system", b"hello", b"answer", b"more"]) == name
    assert chats.name("t", [b"system", b"hello", b"other answer", b"x"]) == name
    assert chats.name("t", [b"system", b"something else"]) != name
    assert chats.name("another", [b"system", b"hello", b"answer", b"more", b"y"]) != name


def test_the_same_question_twice_is_two_chats():
    """Many tasks begin with the same words."""
    chats = GrowingChats()
    assert chats.name("t", [b"hello"]) != chats.name("t", [b"hello"])
