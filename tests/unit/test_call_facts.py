"""An SLO on its way into an engine's process, as durations."""

import math
from dataclasses import replace

import msgspec
import pytest

from tempo_router.prediction import Lengths
from tempo_router.request import DispatchId
from tempo_router.standing import UNRANKED, Standing
from tests.builders import AGENT, BACKGROUND, CHAT, TOOL, request
from workers.call_facts import CallFacts, facts_from_values, values_from_facts


def read(values, *, prompt_tokens=100, max_tokens=200, now_s=5000.0):
    return facts_from_values(
        values, request_id="r", prompt_tokens=prompt_tokens, max_tokens=max_tokens, now_s=now_s, spare_key=-3
    )


@pytest.mark.parametrize("slo", [CHAT, TOOL, AGENT, BACKGROUND])
def test_a_call_is_the_same_on_another_clock(slo):
    """It is 1.5 s old on both, and its target is as far away."""
    spec = request(slo=slo, arrival_s=10.0)
    facts = CallFacts(DispatchId(7), spec, Lengths((1.0, 2.5)), Standing(3.0, False, 4.0, True))
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(values_from_facts(facts, 11.5)))
    known = read(sent)

    assert known.spec.arrival_s == 4998.5
    assert known.spec.slo == slo
    assert (known.key, known.lengths, known.standing) == (7, facts.lengths, facts.standing)


def test_what_an_earlier_attempt_generated_is_not_prompt():
    spec = request(arrival_s=0.0, generated_tokens=30)
    known = read(values_from_facts(CallFacts(DispatchId(7), spec), 1.0), prompt_tokens=130, max_tokens=170)

    assert (known.spec.prompt_tokens, known.spec.generated_tokens, known.spec.context_tokens) == (100, 30, 130)
    assert known.spec.max_output_tokens == 200


def test_a_request_of_a_plain_server_may_say_little():
    known = read({"class": "latency", "due_in_s": 2.0, "tbt_s": 0.1})
    assert (known.key, known.spec.slo, known.spec.arrival_s) == (-3, CHAT, 5000.0)
    assert (known.lengths, known.standing) == (None, UNRANKED)


def test_lengths_are_put_in_order():
    assert read({"class": "best_effort", "lengths": [9, 2.5, 4]}).lengths == Lengths((2.5, 4.0, 9.0))


def test_a_string_of_json_says_the_same():
    """A plain server lets its clients nest nothing."""
    assert read('{"class": "latency", "due_in_s": 2.0, "tbt_s": 0.1}').spec.slo == CHAT


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"class": "urgent"}, "urgent"),
        ({"class": "latency"}, "'due_in_s' is missing"),
        ({}, "'class' is missing"),
        ("x", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["latency"]', "type list: expected a string of JSON that holds an object"),
        (["latency"], "type list"),
        (7, "type int"),
        ({"class": "best_effort", "key": -2}, "key=-2: expected 0 or more"),
        ('{"class": "best_effort", "key": Infinity}', "infinity"),
        ({"class": "best_effort", "generated": math.inf}, "infinity"),
        ({"class": "best_effort", "age_s": math.inf}, "age_s=inf"),
        ({"class": "deadline", "due_in_s": math.nan}, "due_in_s=nan"),
        ({"class": "deadline", "due_in_s": 10**400}, "too large"),
        ({"class": "deadline", "due_in_s": [1.0]}, "list"),
        ({"class": "best_effort", "standing": [math.nan, 1, 0.0, 0]}, "standing=nan"),
        ({"class": "best_effort", "standing": 1.0}, "float"),
        ({"class": "best_effort", "lengths": [1.0, math.nan]}, "lengths=nan"),
        ({"class": "best_effort", "lengths": [1.0, math.inf]}, "lengths=inf"),
        ({"class": "best_effort", "lengths": [1.0] * 1001}, "1001 atoms"),
        ({"class": "latency", "due_in_s": 1.0, "tbt_s": 0.0}, "tbt_s=0.0"),
        ({"class": "latency", "due_in_s": 1.0, "tbt_s": math.inf}, "tbt_s=inf"),
        ({"class": "best_effort", "lengths": 7}, "int"),
    ],
)
def test_what_makes_no_sense_is_refused(values, problem):
    """Any client of a plain server may send it, so it is one error, whatever is wrong."""
    with pytest.raises(ValueError, match=problem):
        read(values)


def test_a_clock_that_ran_ahead_makes_no_request_younger_than_now():
    spec = replace(request(slo=CHAT), arrival_s=12.0)
    assert read(values_from_facts(CallFacts(DispatchId(7), spec), 11.0)).spec.arrival_s == 5000.0
