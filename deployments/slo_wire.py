"""How clients state urgency over HTTP, and what we take it to mean. Pure: no clock, no server.

Forms accepted (header names match without regard to case, and `_` counts as `-`, because proxies rewrite them; an
empty header is none, because they send it for what is not set):

| meaning | body | headers |
| --- | --- | --- |
| tier by name | `slo.tier`, `service_tier` | `x-slo-tier`, `x-llm-d-slo-tier` |
| the same, where it is one of ours | | `x-llm-d-inference-objective`, `x-gateway-inference-objective` |
| time to first token | `slo.ttft_ms` | `x-slo-ttft-ms`, `x-llm-d-slo-ttft-ms` |
| time between tokens | `slo.tbt_ms` | `x-slo-tbt-ms`, `x-slo-tpot-ms`, `x-llm-d-slo-tbt-ms`, `x-llm-d-slo-tpot-ms` |
| time to last token | `slo.ttlt_ms` | `x-slo-ttlt-ms`, `x-llm-d-slo-ttlt-ms` |
| the same as a date | `slo.deadline` (epoch seconds) | `x-slo-deadline`, `x-llm-d-slo-deadline` |
| tenant | `user` | `x-tenant-id`, `x-llm-d-inference-fairness-id`, `x-gateway-inference-fairness-id` |
| application | | `x-tempo-app` |

Rules:
1. For one field the header wins over the body: operators set headers.
2. A target replaces the same target of its tier: tier `chat` with `ttft_ms` 300 keeps chat's `tbt_ms`.
3. What is then left must make sense together, wherever its parts came from; otherwise the request is refused, never
   guessed at: a pace and a deadline, two deadlines, a target that the named tier's class does not have.
4. Half a pace (TTFT without TBT, or the reverse) is completed from the named tier, else from the default tier, else
   from the first tier of class latency.
5. OpenAI's `auto`, `default` and `scale` (capacity that was bought there) and Anthropic's `standard_only` name no
   tier: they agree with any target.
6. A deadline without a tier, or targets without one, belong to no tier: its name is "".
7. Nothing given: the default tier.
8. TTFT and TBT need a stream: with a whole answer nobody sees the first token, so naming them is an error. A *tier*
   of class latency is none, since many clients are given a tier (or the default) without thought of streaming: such a
   call keeps the tier's pace. Its last token, which is all the client sees, is then due when it would have been in a
   stream, at arrival + TTFT + (tokens - 1) x TBT. A deadline computed from `max_tokens` instead would let an answer
   of 50 tokens wait for as long as 4096 may take.
9. OpenAI's `priority` and `flex` mean tiers `interactive` and `background` where the configuration has them, else
   they too name no tier, as OpenAI itself serves with the default when a tier is not to be had. `service_tier` in the
   response says what was used.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from tempo_router.config import OPENAI_TIERS, TierConfig, unknown_key_message
from tempo_router.errors import InvalidSloError
from tempo_router.request import BestEffort, Deadline, Latency, Slo

MAX_TTFT_S = 3600.0
MAX_TBT_S = 60.0
MAX_TTLT_S = 7 * 24 * 3600.0
MAX_NAME_CHARS = 128
_SHOWN_CHARS = 64

Target = Literal["ttft_ms", "tbt_ms", "ttlt_ms", "deadline"]

_TARGETS: tuple[Target, ...] = ("ttft_ms", "tbt_ms", "ttlt_ms", "deadline")
_SLO_KEYS = ("tier", *_TARGETS)
_HEADER_TARGETS: tuple[tuple[str, Target], ...] = (
    ("ttft-ms", "ttft_ms"),
    ("tbt-ms", "tbt_ms"),
    ("tpot-ms", "tbt_ms"),
    ("ttlt-ms", "ttlt_ms"),
    ("deadline", "deadline"),
)
_TARGET_HEADERS: dict[str, Target] = {
    f"{prefix}{name}": target for prefix in ("x-slo-", "x-llm-d-slo-") for name, target in _HEADER_TARGETS
}
_TIER_HEADERS = ("x-slo-tier", "x-llm-d-slo-tier")
_OBJECTIVE_HEADERS = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
_TENANT_HEADERS = ("x-tenant-id", "x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
_APP_HEADER = "x-tempo-app"
_OPENAI_ANY = ("auto", "default", "scale", "standard_only")
_SLO_HEADERS = (*_TARGET_HEADERS, *_TIER_HEADERS)
_LIMIT_MS: dict[Target, tuple[float, str]] = {
    "ttft_ms": (MAX_TTFT_S * 1000, "more than 1 hour"),
    "tbt_ms": (MAX_TBT_S * 1000, "more than 60 seconds"),
    "ttlt_ms": (MAX_TTLT_S * 1000, "more than 7 days"),
}
# float() also reads "1_000", "nan" and " 5 "; a header should hold what it looks like.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class BodyFields:
    """The fields of a request's body that matter here, as they were decoded and not yet checked."""

    slo: object = None
    service_tier: object = None
    user: object = None
    is_streaming: bool = False


@dataclass(frozen=True, slots=True)
class ParsedSlo:
    """What a request asks for.

    tier: name in the configuration, "" for targets of the client's own. service_tier: what to repeat in the
    response, None if the request did not name one. is_own: the client gave targets or a tier; nothing was assumed.
    """

    slo: Slo
    tier: str
    app: str
    tenant: str
    service_tier: str | None
    is_own: bool = False


@dataclass(frozen=True, slots=True)
class _Given:
    """One value as the client wrote it, and the field or header that held it."""

    field: str
    value: object

    def refuse(self, problem: str) -> InvalidSloError:
        return InvalidSloError(self.field, _shown(self.value), problem)


def parse_slo(
    body: BodyFields,
    headers: Iterable[tuple[bytes, bytes]],
    tiers: Mapping[str, TierConfig],
    default_tier: str,
    now_epoch_s: float,
) -> ParsedSlo:
    """Read a request's SLO from its body and its headers, as the rules above say.

    now_epoch_s: wall-clock time of the arrival, to turn a deadline that is a date into a duration.
    Raises InvalidSloError with the field and the value.
    """
    sent = _Headers(headers)
    in_body = _slo_object(body.slo)
    named = _tier(sent, in_body, body.service_tier, tiers)
    targets = _targets(sent, in_body)
    _refuse_contradictions(targets, named, tiers, is_streaming=body.is_streaming)
    slo, tier = _applied(targets, named, tiers, default_tier, now_epoch_s)
    return ParsedSlo(
        slo=slo,
        tier=tier,
        app=_name(sent.first(_APP_HEADER)),
        tenant=_name(sent.first(*_TENANT_HEADERS) or (_Given("user", body.user) if body.user is not None else None)),
        service_tier=_echo(body.service_tier, tier, tiers),
        is_own=bool(targets) or named is not None,
    )


def parse_tenant(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Who asks, as far as the headers say; "" when they do not. Raises InvalidSloError."""
    return _name(_Headers(headers).first(*_TENANT_HEADERS))


def header_text(raw: bytes) -> str:
    """The value of a header: UTF-8, as clients write it, or else latin-1, as HTTP once had it."""
    try:
        return raw.decode().strip()
    except UnicodeDecodeError:
        return raw.decode("latin-1").strip()


class _Headers:
    """The headers that matter here, by normalised name; names are kept as written for messages."""

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._values: dict[str, list[_Given]] = {}
        for raw_name, raw_value in headers:
            if raw_name[:2] not in (b"x-", b"X-", b"x_", b"X_"):
                continue
            written = raw_name.decode("latin-1")
            value = header_text(raw_value)
            name = written.lower().replace("_", "-")
            if name.startswith(("x-slo-", "x-llm-d-slo-")) and name not in _SLO_HEADERS:
                problem = unknown_key_message(name[:_SHOWN_CHARS], _SLO_HEADERS)
                raise InvalidSloError(written[:_SHOWN_CHARS], _shown(value), problem)
            self._values.setdefault(name, []).append(_Given(written, value))

    def first(self, *names: str) -> _Given | None:
        """The value of the first of these headers that is present and not empty."""
        return next((given for name in names for given in self._values.get(name, ()) if given.value != ""), None)

    def all(self, *names: str) -> list[_Given]:
        """Every value of these headers that is not empty, for those of which there may be only one meaning."""
        return [given for name in names for given in self._values.get(name, ()) if given.value != ""]


def _slo_object(slo: object) -> dict[str, object]:
    if slo is None:
        return {}
    if not isinstance(slo, dict):
        raise InvalidSloError("slo", _shown(slo), f"must be an object with keys out of {', '.join(_SLO_KEYS)}")
    for key in slo:
        if key not in _SLO_KEYS:
            raise InvalidSloError(
                f"slo.{key[:_SHOWN_CHARS]}", _shown(slo[key]), unknown_key_message(key[:_SHOWN_CHARS], _SLO_KEYS)
            )
    return {key: value for key, value in slo.items() if value is not None}


def _tier(
    sent: _Headers,
    in_body: dict[str, object],
    service_tier: object,
    tiers: Mapping[str, TierConfig],
) -> _Given | None:
    """The tier that the client named, its value a name of the configuration; None if it left the choice to us."""
    in_headers = sent.all(*_TIER_HEADERS)
    if not in_headers:
        # The name of an objective is the business of whoever runs the gateway; it need not be one of our tiers.
        in_headers = [given for given in sent.all(*_OBJECTIVE_HEADERS) if given.value in tiers]
    in_fields = [
        _Given(field, value)
        for field, value in (("slo.tier", in_body.get("tier")), ("service_tier", service_tier))
        if value is not None
    ]
    from_header, from_body = ([_resolved(given, tiers) for given in source] for source in (in_headers, in_fields))
    return _agreed(from_header) or _agreed(from_body)


def _resolved(given: _Given, tiers: Mapping[str, TierConfig]) -> _Given | None:
    """The same with a name of the configuration, or None for a name of others' that means "as you like"."""
    name = given.value
    if not isinstance(name, str):
        raise given.refuse("must be the name of a tier")
    if name in tiers:
        return given
    if name not in OPENAI_TIERS:
        raise given.refuse(_unknown_tier_message(name, tiers))
    meant = OPENAI_TIERS[name]
    return None if name in _OPENAI_ANY or meant not in tiers else _Given(given.field, meant)


def _unknown_tier_message(name: str, tiers: Mapping[str, TierConfig]) -> str:
    valid = list(dict.fromkeys((*tiers, *OPENAI_TIERS)))
    nearest = difflib.get_close_matches(name[:_SHOWN_CHARS], valid, n=1, cutoff=0.5)
    return f"no such tier; did you mean {nearest[0]!r}?" if nearest else f"no such tier; tiers are {', '.join(valid)}"


def _echo(service_tier: object, applied: str, tiers: Mapping[str, TierConfig]) -> str | None:
    """The value of `service_tier` in the response: the tier used, by the client's word for it where that fits."""
    if service_tier is None:
        return None
    asked = _resolved(_Given("service_tier", service_tier), tiers)
    if asked is not None and applied in ("", asked.value):
        return str(service_tier)
    return "default" if asked is None and applied == "" else applied


def _targets(sent: _Headers, in_body: dict[str, object]) -> dict[Target, tuple[_Given, float]]:
    """The targets that the client gave, checked one by one; milliseconds, or epoch seconds for `deadline`."""
    targets: dict[Target, tuple[_Given, float]] = {}
    for target in _TARGETS:
        headers = [name for name, meant in _TARGET_HEADERS.items() if meant == target]
        given = [(one, _number(one, target)) for one in sent.all(*headers)]
        if given:
            if any(value != given[0][1] for _, value in given):
                raise given[1][0].refuse(f"contradicts {given[0][0].field}={_shown(given[0][0].value)!r}")
            targets[target] = given[0]
        elif target in in_body:
            one = _Given(f"slo.{target}", in_body[target])
            targets[target] = (one, _number(one, target))
    return targets


def _number(given: _Given, target: Target) -> float:
    value = _as_float(given)
    if not math.isfinite(value):
        raise given.refuse("must be a finite number")
    if value / 1000 <= 0:  # as seconds, so that the smallest floats do not vanish
        raise given.refuse("must be greater than zero")
    if target in _LIMIT_MS and value > _LIMIT_MS[target][0]:
        raise given.refuse(f"{_LIMIT_MS[target][1]} is not a target")
    return value


def _as_float(given: _Given) -> float:
    value = given.value
    if isinstance(value, str) and not given.field.startswith("slo."):
        if not NUMBER.fullmatch(value):
            raise given.refuse("must be a number")
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise given.refuse("must be a number")
    return as_float(value)


def as_float(value: float) -> float:
    """A number of JSON, whose whole numbers may have any length: infinity for what no float can hold."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _agreed(named: list[_Given | None]) -> _Given | None:
    """The one tier that all of them name, if any names one."""
    tiers = [given for given in named if given is not None]
    for other in tiers[1:]:
        if other.value != tiers[0].value:
            raise other.refuse(f"contradicts {tiers[0].field}={_shown(tiers[0].value)!r}")
    return tiers[0] if tiers else None


def _refuse_contradictions(
    targets: Mapping[Target, tuple[_Given, float]],
    named: _Given | None,
    tiers: Mapping[str, TierConfig],
    *,
    is_streaming: bool,
) -> None:
    pace = [given for target, (given, _) in targets.items() if target in ("ttft_ms", "tbt_ms")]
    end = [given for target, (given, _) in targets.items() if target in ("ttlt_ms", "deadline")]
    if pace and end:
        raise pace[0].refuse(
            f"contradicts {end[0].field}={_shown(end[0].value)!r}: "
            "give the pace of a stream (TTFT, TBT) or a deadline for the whole (TTLT), not both"
        )
    if len(end) > 1:
        raise end[1].refuse(f"contradicts {end[0].field}={_shown(end[0].value)!r}: both say when the answer is due")
    if pace and not is_streaming:
        raise pace[0].refuse("has no meaning without streaming; set stream to true, or give a TTLT")
    if named is not None:
        tier_class = tiers[str(named.value)].slo_class
        for given in (*(pace if tier_class != "latency" else ()), *(end if tier_class != "deadline" else ())):
            raise given.refuse(f"contradicts {named.field}={_shown(named.value)!r}, a tier of class {tier_class!r}")


def _applied(
    targets: Mapping[Target, tuple[_Given, float]],
    named: _Given | None,
    tiers: Mapping[str, TierConfig],
    default_tier: str,
    now_epoch_s: float,
) -> tuple[Slo, str]:
    tier = str(named.value) if named is not None else ""
    if not targets:
        tier = tier or default_tier
        return tiers[tier].slo(), tier
    if "ttlt_ms" in targets:
        return Deadline(ttlt_s=targets["ttlt_ms"][1] / 1000), tier
    if "deadline" in targets:
        return _deadline(*targets["deadline"], now_epoch_s), tier
    return _pace(targets, tiers, tier or default_tier), tier


def _deadline(given: _Given, epoch_s: float, now_epoch_s: float) -> Deadline:
    ttlt_s = epoch_s - now_epoch_s
    if ttlt_s <= 0:
        raise given.refuse("lies in the past (epoch seconds)")
    if ttlt_s > MAX_TTLT_S:
        raise given.refuse("lies more than 7 days ahead (epoch seconds)")
    return Deadline(ttlt_s=ttlt_s)


def _pace(targets: Mapping[Target, tuple[_Given, float]], tiers: Mapping[str, TierConfig], tier: str) -> Latency:
    ttft, tbt = targets.get("ttft_ms"), targets.get("tbt_ms")
    if ttft is not None and tbt is not None:
        return Latency(ttft_s=ttft[1] / 1000, tbt_s=tbt[1] / 1000)
    candidates = (tiers[tier].slo(), *(other.slo() for other in tiers.values()))
    base = next((slo for slo in candidates if isinstance(slo, Latency)), None)
    if base is None:
        given, missing = (ttft[0], "tbt_ms") if ttft is not None else (targets["tbt_ms"][0], "ttft_ms")
        raise given.refuse(f"needs {missing} beside it: no tier of class 'latency' is configured to take it from")
    return Latency(
        ttft_s=ttft[1] / 1000 if ttft is not None else base.ttft_s,
        tbt_s=tbt[1] / 1000 if tbt is not None else base.tbt_s,
    )


def _name(given: _Given | None) -> str:
    """A name that may become a key of a table or a label: short and printable."""
    if given is None:
        return ""
    if not isinstance(given.value, str):
        raise given.refuse("must be text")
    if len(given.value) > MAX_NAME_CHARS:
        raise given.refuse(f"is longer than {MAX_NAME_CHARS} characters")
    if not given.value.isprintable():
        raise given.refuse("holds characters that cannot be printed")
    return given.value


def _shown(value: object) -> object:
    """The value for a message: bounded, since a client chose it."""
    if isinstance(value, dict | list):
        return f"<{'object' if isinstance(value, dict) else 'array'} of {len(value)}>"
    if isinstance(value, str):
        return value if len(value) <= _SHOWN_CHARS else value[:_SHOWN_CHARS] + "..."
    if isinstance(value, int) and abs(value) >= 10**_SHOWN_CHARS:
        return f"<a number of more than {_SHOWN_CHARS} digits>"
    return value


def applied_targets_ms(slo: Slo) -> dict[str, float]:
    """The targets as responses print them: milliseconds by field name; empty for best effort.

    0 for a deadline that had passed when the request came.
    """
    match slo:
        case Latency(ttft_s=ttft_s, tbt_s=tbt_s):
            return {"ttft_ms": ttft_s * 1000, "tbt_ms": tbt_s * 1000}
        case BestEffort():
            return {}
        case _:
            return {"ttlt_ms": max(slo.ttlt_s, 0.0) * 1000}
