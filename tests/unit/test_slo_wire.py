"""What clients may write about urgency, and what it is taken to mean."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.slo_wire import BodyFields, ParsedSlo, applied_targets_ms, parse_slo, parse_tenant
from tempo_router.config import DEFAULT_TIERS, TierConfig
from tempo_router.errors import InvalidSloError
from tempo_router.request import BestEffort, Deadline, Latency

NOW_EPOCH_S = 1_800_000_000.0
CHAT = Latency(ttft_s=2.0, tbt_s=0.1)


def parsed(headers=None, tiers=DEFAULT_TIERS, default_tier="chat", is_streaming=True, **fields) -> ParsedSlo:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    return parse_slo(BodyFields(**fields, is_streaming=is_streaming), raw, tiers, default_tier, NOW_EPOCH_S)


def test_nothing_given_gets_the_default_tier():
    assert parsed() == ParsedSlo(slo=CHAT, tier="chat", app="", tenant="", service_tier=None)


@pytest.mark.parametrize(
    ("fields", "headers", "slo", "tier"),
    [
        ({"slo": {"tier": "tool"}}, {}, Deadline(20), "tool"),
        ({"slo": None}, {}, CHAT, "chat"),
        ({"slo": {"tier": None, "ttft_ms": None}}, {}, CHAT, "chat"),
        ({"slo": {"ttlt_ms": 1500}}, {}, Deadline(1.5), ""),
        ({"slo": {"deadline": NOW_EPOCH_S + 30}}, {}, Deadline(30), ""),
        ({"slo": {"tier": "tool", "deadline": NOW_EPOCH_S + 30}}, {}, Deadline(30), "tool"),
        ({"slo": {"ttft_ms": 300, "tbt_ms": 40}}, {}, Latency(0.3, 0.04), ""),
        ({"slo": {"ttft_ms": 300}}, {}, Latency(0.3, 0.1), ""),
        ({"slo": {"tier": "interactive", "ttft_ms": 300}}, {}, Latency(0.3, 0.05), "interactive"),
        ({"slo": {"tier": "interactive", "tbt_ms": 20}}, {}, Latency(0.5, 0.02), "interactive"),
        ({"service_tier": "background"}, {}, BestEffort(), "background"),
        ({"service_tier": "auto"}, {}, CHAT, "chat"),
        ({"service_tier": "scale"}, {}, CHAT, "chat"),
        ({"service_tier": "standard_only"}, {}, CHAT, "chat"),
        ({"service_tier": "standard_only", "slo": {"ttlt_ms": 900}}, {}, Deadline(0.9), ""),
        ({"service_tier": "priority"}, {}, Latency(0.5, 0.05), "interactive"),
        ({"service_tier": "flex"}, {}, BestEffort(), "background"),
        ({"service_tier": "auto", "slo": {"ttlt_ms": 900}}, {}, Deadline(0.9), ""),
        ({"service_tier": "priority", "slo": {"tier": "interactive"}}, {}, Latency(0.5, 0.05), "interactive"),
        ({}, {"x-slo-ttft-ms": "300"}, Latency(0.3, 0.1), ""),
        ({}, {"X_SLO_TTFT_MS": " 300 ", "X-Slo-Tpot-Ms": "2e1"}, Latency(0.3, 0.02), ""),
        ({}, {"x-slo-tbt-ms": "20.5"}, Latency(2.0, 0.0205), ""),
        ({}, {"x-llm-d-slo-ttft-ms": "300", "x-llm-d-slo-tpot-ms": "20"}, Latency(0.3, 0.02), ""),
        ({}, {"x-slo-ttft-ms": "300", "x-llm-d-slo-ttft-ms": "300.0"}, Latency(0.3, 0.1), ""),
        ({}, {"x-slo-ttft-ms": "", "x-slo-tbt-ms": " "}, CHAT, "chat"),
        ({}, {"x-slo-tier": "", "x-llm-d-slo-tier": "tool"}, Deadline(20), "tool"),
        ({"slo": {"tier": "tool"}}, {"x-slo-tier": "", "x-slo-deadline": ""}, Deadline(20), "tool"),
        ({}, {"x-slo-ttlt-ms": "5000"}, Deadline(5), ""),
        ({}, {"x-llm-d-slo-ttlt-ms": "5000"}, Deadline(5), ""),
        ({}, {"x-slo-deadline": f"{NOW_EPOCH_S + 7:.0f}"}, Deadline(7), ""),
        ({}, {"x-slo-tier": "tool"}, Deadline(20), "tool"),
        ({}, {"x-llm-d-inference-objective": "tool"}, Deadline(20), "tool"),
        ({}, {"x-llm-d-inference-objective": "their-own-name"}, CHAT, "chat"),
        ({"slo": {"tier": "tool"}}, {"x-slo-tier": "background"}, BestEffort(), "background"),
        ({"slo": {"ttft_ms": 900, "tbt_ms": 30}}, {"x-slo-ttft-ms": "300"}, Latency(0.3, 0.03), ""),
        ({"slo": {"tier": "tool", "ttlt_ms": 900}}, {"x-slo-ttlt-ms": "300"}, Deadline(0.3), "tool"),
    ],
)
def test_a_statement_of_urgency_means(fields, headers, slo, tier):
    got = parsed(headers, **fields)
    assert (got.tier, type(got.slo)) == (tier, type(slo))
    assert applied_targets_ms(got.slo) == pytest.approx(applied_targets_ms(slo))


@pytest.mark.parametrize(
    ("fields", "headers", "field", "words"),
    [
        ({"slo": {"ttft_ms": -5}}, {}, "slo.ttft_ms", "-5"),
        ({"slo": {"ttft_ms": 0}}, {}, "slo.ttft_ms", "greater than zero"),
        ({"slo": {"ttft_ms": 5e-324}}, {}, "slo.ttft_ms", "greater than zero"),
        ({"slo": {"ttft_ms": math.nan}}, {}, "slo.ttft_ms", "nan"),
        ({"slo": {"ttlt_ms": math.inf}}, {}, "slo.ttlt_ms", "finite"),
        ({"slo": {"ttlt_ms": 10**400}}, {}, "slo.ttlt_ms", "finite"),
        ({"slo": {"tbt_ms": True}}, {}, "slo.tbt_ms", "must be a number"),
        ({"slo": {"tbt_ms": "50"}}, {}, "slo.tbt_ms", "must be a number"),
        ({"slo": {"tbt_ms": [50]}}, {}, "slo.tbt_ms", "must be a number"),
        ({"slo": {"ttft_ms": 3_600_001}}, {}, "slo.ttft_ms", "1 hour"),
        ({"slo": {"tbt_ms": 60_001}}, {}, "slo.tbt_ms", "60 seconds"),
        ({"slo": {"ttlt_ms": 604_800_001}}, {}, "slo.ttlt_ms", "7 days"),
        ({"slo": {"deadline": NOW_EPOCH_S - 1}}, {}, "slo.deadline", "past"),
        ({"slo": {"deadline": NOW_EPOCH_S}}, {}, "slo.deadline", "past"),
        ({"slo": {"deadline": NOW_EPOCH_S * 1000}}, {}, "slo.deadline", "7 days"),
        ({"slo": {"deadline": -1}}, {}, "slo.deadline", "-1"),
        ({"slo": {"ttft": 5}}, {}, "slo.ttft", "did you mean 'ttft_ms'"),
        ({"slo": {"zzzz": 5}}, {}, "slo.zzzz", "valid keys are"),
        ({"slo": "chat"}, {}, "slo", "must be an object"),
        ({"slo": [1]}, {}, "slo", "array of 1"),
        ({"slo": {"tier": "chta"}}, {}, "slo.tier", "did you mean 'chat'"),
        ({"slo": {"tier": 5}}, {}, "slo.tier", "name of a tier"),
        ({"service_tier": "monkey"}, {}, "service_tier", "'monkey': no such tier"),
        ({"service_tier": ["chat"]}, {}, "service_tier", "name of a tier"),
        ({"service_tier": "tool", "slo": {"tier": "chat"}}, {}, "service_tier", "contradicts slo.tier='chat'"),
        ({}, {"x-slo-tier": "tol"}, "x-slo-tier", "did you mean 'tool'"),
        ({}, {"x-slo-ttft-ms": "soon"}, "x-slo-ttft-ms", "'soon': must be a number"),
        ({}, {"x-slo-ttft-ms": "nan"}, "x-slo-ttft-ms", "must be a number"),
        ({}, {"x-slo-ttft-ms": "1_000"}, "x-slo-ttft-ms", "must be a number"),
        ({}, {"x-slo-ttft-ms": "1e999"}, "x-slo-ttft-ms", "finite"),
        ({}, {"X-SLO-TTFT-MS": "-3"}, "X-SLO-TTFT-MS", "'-3'"),
        ({}, {"x-slo-ttft": "3"}, "x-slo-ttft", "did you mean 'x-slo-ttft-ms'"),
        ({}, {"x-slo-tpot-ms": "3", "x-slo-tbt-ms": "4"}, "x-slo-tpot-ms", "contradicts x-slo-tbt-ms='4'"),
        ({"slo": {"ttft_ms": 5, "ttlt_ms": 5}}, {}, "slo.ttft_ms", "contradicts slo.ttlt_ms=5"),
        ({"slo": {"ttlt_ms": 5, "deadline": NOW_EPOCH_S + 5}}, {}, "slo.deadline", "contradicts slo.ttlt_ms=5"),
        ({"slo": {"ttlt_ms": 5}}, {"x-slo-ttft-ms": "300"}, "x-slo-ttft-ms", "contradicts slo.ttlt_ms=5"),
        ({"slo": {"tbt_ms": 5}}, {"x-slo-deadline": "1800000005"}, "slo.tbt_ms", "contradicts x-slo-deadline"),
        ({"slo": {"tier": "tool", "ttft_ms": 5}}, {}, "slo.ttft_ms", "contradicts slo.tier='tool'"),
        ({"slo": {"tier": "chat", "ttlt_ms": 5}}, {}, "slo.ttlt_ms", "class 'latency'"),
        ({"slo": {"ttlt_ms": 5}}, {"x-slo-tier": "background"}, "slo.ttlt_ms", "contradicts x-slo-tier='background'"),
        ({"slo": {"ttft_ms": 5}, "is_streaming": False}, {}, "slo.ttft_ms", "without streaming"),
        ({"is_streaming": False}, {"x-slo-tpot-ms": "50"}, "x-slo-tpot-ms", "without streaming"),
        ({"user": "a" * 129}, {}, "user", "128"),
        ({"user": "a\nb"}, {}, "user", "cannot be printed"),
        ({"user": 5}, {}, "user", "must be text"),
        ({}, {"x-tenant-id": "a\x00b"}, "x-tenant-id", "cannot be printed"),
        ({}, {"x-tempo-app": "a" * 129}, "x-tempo-app", "128"),
    ],
)
def test_nonsense_is_refused_by_field_and_value(fields, headers, field, words):
    with pytest.raises(InvalidSloError) as refused:
        parsed(headers, **fields)
    assert refused.value.field == field
    assert words in str(refused.value)


def test_a_long_value_is_shortened_in_the_message():
    with pytest.raises(InvalidSloError) as refused:
        parsed(slo={"tier": "x" * 10_000})
    assert len(str(refused.value)) < 300


def test_a_tier_of_class_latency_without_a_stream_keeps_its_pace():
    assert parsed(is_streaming=False).slo == CHAT
    assert parsed(is_streaming=False, slo={"tier": "interactive"}).slo == Latency(0.5, 0.05)


def test_half_a_pace_is_completed_from_the_default_tier_or_the_first_latency_tier():
    tiers = {"work": TierConfig(slo_class="best_effort"), "talk": TierConfig(slo_class="latency", ttft_ms=9, tbt_ms=7)}
    assert parsed(tiers=tiers, default_tier="work", slo={"ttft_ms": 300}).slo == Latency(0.3, 0.007)
    assert parsed(tiers=tiers, default_tier="work", slo={"tbt_ms": 300}).slo == Latency(0.009, 0.3)


def test_half_a_pace_without_any_latency_tier_is_refused():
    tiers = {"work": TierConfig(slo_class="best_effort")}
    with pytest.raises(InvalidSloError, match="needs tbt_ms"):
        parsed(tiers=tiers, default_tier="work", slo={"ttft_ms": 300})


def test_openai_names_fall_back_to_the_default_where_their_tier_is_not_configured():
    tiers = {"work": TierConfig(slo_class="best_effort")}
    got = parsed(tiers=tiers, default_tier="work", service_tier="priority")
    assert (got.slo, got.tier, got.service_tier) == (BestEffort(), "work", "work")


def test_a_configured_tier_goes_before_openais_meaning_of_its_name():
    tiers = {**DEFAULT_TIERS, "default": TierConfig(slo_class="deadline", ttlt_ms=8)}
    got = parsed(tiers=tiers, service_tier="default")
    assert (got.slo, got.tier, got.service_tier) == (Deadline(0.008), "default", "default")


@pytest.mark.parametrize(
    ("fields", "headers", "echo"),
    [
        ({"service_tier": "tool"}, {}, "tool"),
        ({"service_tier": "priority"}, {}, "priority"),
        ({"service_tier": "auto"}, {}, "chat"),
        ({"service_tier": "tool"}, {"x-slo-tier": "background"}, "background"),
        ({"service_tier": "auto", "slo": {"ttlt_ms": 5}}, {}, "default"),
        ({}, {"x-slo-tier": "background"}, None),
    ],
)
def test_service_tier_of_the_response_says_what_was_used(fields, headers, echo):
    assert parsed(headers, **fields).service_tier == echo


def test_tenant_and_application_come_from_headers_first():
    got = parsed({"x-tenant-id": "acme", "x-tempo-app": "agent"}, user="someone")
    assert (got.tenant, got.app) == ("acme", "agent")
    assert parsed({"x-llm-d-inference-fairness-id": "acme"}).tenant == "acme"
    assert parsed(user="someone").tenant == "someone"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_names_in_headers_are_what_their_client_wrote(encoding):
    """Most clients write UTF-8, old ones what HTTP once said; httpx writes either."""
    raw = [(b"x-tenant-id", "Ünal".encode(encoding)), (b"x-tempo-app", "café".encode(encoding))]
    got = parse_slo(BodyFields(), raw, DEFAULT_TIERS, "chat", NOW_EPOCH_S)
    assert (got.tenant, got.app) == ("Ünal", "café")
    assert parse_tenant(raw) == "Ünal"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SLO = st.fixed_dictionaries(
    {}, optional={name: JSON | st.floats(1, 1e5) for name in ("tier", "ttft_ms", "tbt_ms", "ttlt_ms", "deadline")}
)


@given(slo=SLO | JSON, service_tier=JSON, user=JSON, is_streaming=st.booleans(), header=st.text(max_size=6))
def test_any_json_is_either_understood_or_refused(slo, service_tier, user, is_streaming, header):
    """Whatever a client sends, the only exception is the one that becomes a 400, and targets are usable numbers."""
    raw = [(b"x-slo-ttlt-ms", header.encode("utf-8", "surrogatepass"))] if header else []
    try:
        got = parse_slo(BodyFields(slo, service_tier, user, is_streaming), raw, DEFAULT_TIERS, "chat", NOW_EPOCH_S)
    except InvalidSloError:
        return
    assert all(0 < value < math.inf for value in applied_targets_ms(got.slo).values())
    assert got.tier in {"", *DEFAULT_TIERS}
