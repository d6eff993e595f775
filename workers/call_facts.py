"""What travels with a request into an engine's process so that its steps can be planned there.

`SamplingParams.extra_args["tempo"]` holds it as plain values. Times are durations until something is due: the engine
turns them into times of its own monotonic clock when the request reaches its scheduler. All keys but `class` may be
left out, so requests of a plain vLLM server can carry the same, there as a string of JSON, since vLLM lets its clients
nest nothing in `vllm_xargs`:

    class           "latency", "deadline", "program" or "best_effort"
    due_in_s        until the first token is due (latency), or the last one
    tbt_s           between tokens (latency)
    program         name of the program (program)
    age_s           since the request came to its ingress; 0
    key             the router's dispatch id; 0 or more
    generated       answer tokens that are part of the prompt, from an attempt that was lost; 0
    standing        [density, is_admitted, later_s, is_relegated] of the last plan over the whole queue
    lengths         atoms of the distribution of the answer's length, ascending
    app, tenant     as the client called itself
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

from tempo_router.prediction import Lengths
from tempo_router.request import (
    BestEffort,
    Deadline,
    DispatchId,
    GroupId,
    Latency,
    ProgramCall,
    ProgramId,
    RequestId,
    RequestSpec,
    Slo,
    slo_class,
)
from tempo_router.standing import UNRANKED, Standing

KEY = "tempo"
"""Of `additional_config` (settings) and of `SamplingParams.extra_args` (facts of one request)."""


_MOST_ATOMS = 1000
"""The planner's table has room for as many in every row as any call has."""


@dataclass(frozen=True, slots=True)
class CallFacts:
    """What the router knows of a call beyond what its payload says. lengths: None where it has no estimate."""

    key: DispatchId
    spec: RequestSpec
    lengths: Lengths | None = None
    standing: Standing = UNRANKED


@dataclass(frozen=True, slots=True)
class CallUpdate:
    """News of a call in an engine, by the name that it has there; None: as it was."""

    request_id: str
    standing: Standing | None = None
    slo: Slo | None = None


@dataclass(frozen=True, slots=True)
class News:
    """What the router planned anew. step_cap_s: longest step; None leaves it to the policy's rule."""

    updates: tuple[CallUpdate, ...]
    step_cap_s: float | None


def values_from_facts(facts: CallFacts, now_s: float) -> dict[str, Any]:
    """The plain values. now_s: the clock of facts.spec.arrival_s."""
    spec = facts.spec
    values: dict[str, Any] = {
        "class": slo_class(spec.slo),
        "key": facts.key,
        "age_s": now_s - spec.arrival_s,
        "generated": spec.generated_tokens,
        "standing": list(facts.standing),
        "app": spec.app,
        "tenant": spec.tenant,
    }
    if facts.lengths is not None:
        values["lengths"] = list(facts.lengths.atoms)
    match spec.slo:
        case Latency(ttft_s=ttft_s, tbt_s=tbt_s):
            values |= {"due_in_s": spec.arrival_s + ttft_s - now_s, "tbt_s": tbt_s}
        case Deadline(ttlt_s=ttlt_s):
            values["due_in_s"] = spec.arrival_s + ttlt_s - now_s
        case ProgramCall(program_id=program_id, ttlt_s=ttlt_s):
            values |= {"due_in_s": spec.arrival_s + ttlt_s - now_s, "program": program_id}
        case BestEffort():
            pass
        case _:
            assert_never(spec.slo)
    return values


def facts_from_values(
    values: Mapping[str, Any] | str,
    *,
    request_id: str,
    prompt_tokens: int,
    max_tokens: int,
    now_s: float,
    spare_key: int,
) -> CallFacts:
    """Read the values on the clock of now_s. Raises ValueError for what cannot be read: any client may have sent it.

    prompt_tokens, max_tokens: as the engine sees them, so with what earlier attempts generated in the prompt.
    spare_key: for requests that did not come through a router. prefix_id: the request's own name, as whoever plans
    asks the engine's cache by it.
    """
    try:
        return _facts(
            _mapping(values),
            request_id=request_id,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            now_s=now_s,
            spare_key=spare_key,
        )
    except KeyError as missing:
        raise ValueError(f"{missing} is missing") from missing
    except (TypeError, OverflowError) as problem:
        raise ValueError(str(problem)) from problem


def _mapping(values: object) -> Mapping[str, Any]:
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except (ValueError, RecursionError) as problem:
            raise ValueError(f"not JSON: {problem}") from problem
    if not isinstance(values, Mapping):
        raise TypeError(f"a value of type {type(values).__name__}: expected a string of JSON that holds an object")
    return values


def _facts(
    values: Mapping[str, Any], *, request_id: str, prompt_tokens: int, max_tokens: int, now_s: float, spare_key: int
) -> CallFacts:
    age_s = max(0.0, _finite(values.get("age_s", 0.0), "age_s"))
    generated = min(max(0, int(values.get("generated", 0))), prompt_tokens)
    spec = RequestSpec(
        request_id=RequestId(request_id),
        arrival_s=now_s - age_s,
        slo=_slo(values, age_s),
        prompt_tokens=prompt_tokens - generated,
        max_output_tokens=max_tokens + generated,
        group_id=GroupId(request_id),
        app=str(values.get("app", "")),
        tenant=str(values.get("tenant", "")),
        generated_tokens=generated,
        prefix_id=request_id,
        prefix_tokens=prompt_tokens,
    )
    atoms = values.get("lengths")
    lengths = _lengths(atoms) if atoms else None
    density, is_admitted, later_s, is_relegated = values.get("standing", UNRANKED)
    standing = Standing(
        _number(density, "standing"), bool(is_admitted), _number(later_s, "standing"), bool(is_relegated)
    )
    return CallFacts(_key(values, spare_key), spec, lengths, standing)


def _lengths(atoms: Sequence[Any]) -> Lengths:
    if len(atoms) > _MOST_ATOMS:
        raise ValueError(f"lengths: {len(atoms)} atoms: expected {_MOST_ATOMS} at most")
    return Lengths(tuple(sorted(_finite(atom, "lengths") for atom in atoms)))


def _key(values: Mapping[str, Any], spare_key: int) -> DispatchId:
    if "key" not in values:
        return DispatchId(spare_key)
    key = int(values["key"])
    if key < 0:
        # Those are given to requests without one.
        raise ValueError(f"key={key}: expected 0 or more")
    return DispatchId(key)


def _number(value: Any, name: str) -> float:
    number = float(value)
    if math.isnan(number):
        # It has no place in an order.
        raise ValueError(f"{name}={number}: expected a number")
    return number


def _finite(value: Any, name: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name}={number}: expected a finite number")
    return number


def _pace_s(value: Any) -> float:
    tbt_s = _finite(value, "tbt_s")
    if tbt_s <= 0:
        # The tightest pace of all streams bounds every step.
        raise ValueError(f"tbt_s={tbt_s}: expected a number above 0")
    return tbt_s


def _slo(values: Mapping[str, Any], age_s: float) -> Slo:
    match values["class"]:
        case "latency":
            return Latency(age_s + _number(values["due_in_s"], "due_in_s"), _pace_s(values["tbt_s"]))
        case "deadline":
            return Deadline(age_s + _number(values["due_in_s"], "due_in_s"))
        case "program":
            return ProgramCall(ProgramId(str(values["program"])), age_s + _number(values["due_in_s"], "due_in_s"))
        case "best_effort":
            return BestEffort()
        case unknown:
            raise ValueError(f"class={unknown!r}: expected latency, deadline, program or best_effort")
