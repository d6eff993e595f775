"""Where prefixes are believed to be cached."""

from dataclasses import replace

from tempo_router.prefixes import PrefixMemory
from tempo_router.request import ReplicaId, RequestSpec
from tests.builders import request

GPU0, GPU1 = ReplicaId("gpu0"), ReplicaId("gpu1")


def with_prefix(prefix_id: str = "p", prefix_tokens: int = 60, prompt_tokens: int = 100) -> RequestSpec:
    return replace(request(prompt_tokens=prompt_tokens), prefix_id=prefix_id, prefix_tokens=prefix_tokens)


def test_a_prefix_is_where_its_last_call_ended():
    memory = PrefixMemory()
    memory.remember(with_prefix(), GPU0, 10)
    memory.remember(with_prefix(), GPU1, 10)
    assert memory.home(with_prefix()) == GPU1
    assert memory.home(with_prefix("another")) is None


def test_cached_are_at_most_the_prefix_what_was_computed_and_all_but_the_last_token_of_the_context():
    memory = PrefixMemory()
    memory.remember(with_prefix(prompt_tokens=70), GPU0, 10)
    assert memory.cached_tokens(with_prefix(prefix_tokens=60)) == 60
    assert memory.cached_tokens(with_prefix(prefix_tokens=90)) == 80
    assert memory.cached_tokens(with_prefix(prefix_tokens=60, prompt_tokens=60)) == 59


def test_requests_that_name_no_prefix_or_share_none_of_it_leave_no_trace_and_find_nothing():
    memory = PrefixMemory()
    memory.remember(request(), GPU0, 10)
    memory.remember(with_prefix(), GPU0, 10)
    for stranger in (request(), with_prefix(prefix_tokens=0)):
        assert memory.home(stranger) is None
        assert memory.cached_tokens(stranger) == 0


def test_the_prefix_that_ended_longest_ago_is_forgotten_first():
    memory = PrefixMemory(most=2)
    for prefix_id in ("a", "b", "a", "c"):
        memory.remember(with_prefix(prefix_id), GPU0, 10)
    assert [memory.home(with_prefix(prefix_id)) for prefix_id in "abc"] == [GPU0, None, GPU0]
