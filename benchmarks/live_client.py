"""Open-loop clients of a served application: a trace is replayed in real time, and every token is timed.

Requests are sent when the trace says so, whatever became of those before. Lengths are forced: prompts are made-up token
ids of the trace's lengths (equal beginnings for equal prefix ids), answers end where the trace's end. Streams are
streamed; answers with a deadline are asked for whole; a program's call names its program, its place there and the
program's deadline. When a call of a program is refused or given up, its client withdraws the rest, as the simulator's
does, and says so.
"""

import asyncio
import json
import random
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import numpy as np

from tempo_router.request import Deadline, Latency, slo_class
from tempo_router.simulation.report import CallDelivery, Report, Status, UnitOutcome, unit_outcome
from tempo_router.simulation.trace import Trace, TraceCall, Unit

_FIRST_TOKEN, _TOKEN_KINDS = 97, 26
"""Token ids of small letters in tempo-tiny; any model has these ids."""
_REFUSED: dict[int, Status] = {429: "refused", 503: "refused", 504: "expired"}
_TIMEOUT_S = 600.0
_BEST_EFFORT_PRIORITY = 10**9
"""After everything that is due within eleven days."""


@dataclass(slots=True)
class Delivered:
    """One call as its client saw it. times_s: of each token for streams, of the whole answer otherwise."""

    call: TraceCall
    times_s: list[float] = field(default_factory=list)
    tokens: int = 0
    status: Status = "cut"

    def end(self) -> None:
        """The server says that this was all: finished with every token, given up with fewer, whatever it calls it."""
        self.status = "finished" if self.tokens == self.call.output_tokens else "expired"


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.

    urls: of equal servers, without the path; a call goes to the one with the fewest open calls, as behind a plain
    balancer. model: as they call it. has_programs: they are told when a program is over; the headers go to all.
    has_priorities: calls carry vLLM's `priority`, earliest deadline first.
    """

    urls: tuple[str, ...]
    model: str
    has_programs: bool = True
    has_priorities: bool = False


class Sender(Protocol):
    """The way to the server."""

    async def send(self, unit: Unit, call: TraceCall, delivered: Delivered, now_s: Callable[[], float]) -> None:
        """Send a call, wait for its end and note what came in `delivered`. now_s: the clock of the trace."""
        ...

    async def end_program(self, unit: Unit, *, is_complete: bool) -> None:
        """No further call of this program will come. is_complete: all were answered; else it is given up."""
        ...


async def replay_http(trace: Trace, target: Target, *, limit_s: float) -> Report:
    """`replay` over HTTP."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        return await replay(trace, HttpSender(target, session), limit_s=limit_s)


async def replay(trace: Trace, sender: Sender, *, limit_s: float) -> Report:
    """Send the trace and judge what comes back. limit_s: after the last arrival; what is open then is cut off.

    Raises what the first call raised that failed, at once; the rest is cut off.
    """
    began_s = time.perf_counter()
    units = [_UnitClient(unit, sender, began_s) for unit in trace.units]
    tasks = [asyncio.create_task(unit.run()) for unit in units]
    done, _ = await asyncio.wait(tasks, timeout=trace.span_s + limit_s, return_when=asyncio.FIRST_EXCEPTION)
    duration_s = time.perf_counter() - began_s
    for task in tasks:
        task.cancel()
    # What failed while it was cut off comes last: it may only follow from the first failure.
    order = sorted(tasks, key=lambda task: task not in done)
    failures = [one for one in await asyncio.gather(*order, return_exceptions=True) if isinstance(one, Exception)]
    if failures:
        raise failures[0]
    return _report(trace, units, duration_s)


class _UnitClient:
    """One client with its unit: sends calls when those before them have ended and their tools have run."""

    def __init__(self, unit: Unit, sender: Sender, began_s: float) -> None:
        self.unit = unit
        self.delivered: dict[int, Delivered] = {}
        self._sender = sender
        self._began_s = began_s

    async def run(self) -> None:
        """From its arrival to the end of its last call, or of the first that does not finish."""
        await self._sleep_until(self.unit.arrival_s)
        ended: dict[int, asyncio.Task[bool]] = {}
        for position, call in enumerate(self.unit.calls):
            ended[position] = asyncio.create_task(self._after_parents(call, position, ended))
        is_complete = False
        try:
            is_complete = await _all_finish(ended.values())
        finally:
            for task in ended.values():
                task.cancel()
            await asyncio.gather(*ended.values(), return_exceptions=True)
            if self.unit.is_program and self.delivered:
                await self._sender.end_program(self.unit, is_complete=is_complete)

    @property
    def status(self) -> Status:
        """Finished, or what became of the call that was refused or given up; cut if the run ended first."""
        statuses = [one.status for one in self.delivered.values()]
        given_up = next((status for status in statuses if status not in ("finished", "cut")), None)
        if given_up is not None:
            return given_up
        is_finished = len(statuses) == len(self.unit.calls) and "cut" not in statuses
        return "finished" if is_finished else "cut"

    async def _after_parents(self, call: TraceCall, position: int, ended: dict[int, asyncio.Task[bool]]) -> bool:
        parents = await asyncio.gather(*(ended[parent] for parent in call.parents))
        if not all(parents):
            return False
        if call.gap_s:
            await asyncio.sleep(call.gap_s)
        delivered = self.delivered[position] = Delivered(call)
        await self._sender.send(self.unit, call, delivered, self._now_s)
        return delivered.status == "finished"

    async def _sleep_until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, self._began_s + at_s - time.perf_counter()))

    def _now_s(self) -> float:
        return time.perf_counter() - self._began_s

    def outcome(self) -> UnitOutcome:
        """Judged by what was delivered, as the simulator judges."""
        deliveries = [
            CallDelivery(one.call.prompt_tokens, one.tokens, one.times_s, one.status == "finished")
            for _, one in sorted(self.delivered.items())
        ]
        name = "program" if self.unit.is_program else slo_class(self.unit.slo)
        return unit_outcome(self.unit, name, self.status, deliveries)

    def gaps_s(self) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
        """Gaps between the tokens of streams."""
        if not isinstance(self.unit.slo, Latency):
            return []
        return [np.diff(one.times_s) for one in self.delivered.values() if len(one.times_s) > 1]


async def _all_finish(calls: Iterable[asyncio.Task[bool]]) -> bool:
    """Wait until all have finished, or one has not."""
    for ended in asyncio.as_completed(calls):
        if not await ended:
            return False
    return True


class HttpSender:
    """Over HTTP, as any client of the OpenAI API. Programs of two senders never have the same name."""

    def __init__(self, target: Target, session: aiohttp.ClientSession) -> None:
        self._target = target
        self._session = session
        self._run = uuid.uuid4()
        self._open = dict.fromkeys(target.urls, 0)

    async def send(self, unit: Unit, call: TraceCall, delivered: Delivered, now_s: Callable[[], float]) -> None:
        """One request to /v1/completions."""
        url = min(self._open, key=lambda url: self._open[url])
        self._open[url] += 1
        try:
            await self._send_to(f"{url}/v1/completions", unit, call, delivered, now_s)
        finally:
            self._open[url] -= 1

    async def end_program(self, unit: Unit, *, is_complete: bool) -> None:
        """One request to /v1/programs, where there is such a path. Raises RuntimeError when it is refused."""
        if not self._target.has_programs:
            return
        verb = "finish" if is_complete else "cancel"
        url = f"{self._target.urls[0]}/v1/programs/{program_name(unit, self._run)}/{verb}"
        async with self._session.post(url, json={"user": unit.tenant} if unit.tenant else {}) as response:
            text = await response.text()
            # What was cut off before the server had read it made no program.
            is_unknown = not is_complete and response.status == 404 and "unknown_program" in text
            if response.status != 200 and not is_unknown:
                raise RuntimeError(f"{verb} {unit.unit_id}: {response.status} {text[:200]}")

    async def _send_to(
        self, url: str, unit: Unit, call: TraceCall, delivered: Delivered, now_s: Callable[[], float]
    ) -> None:
        body, headers = self._body(unit, call, now_s()), headers_of(unit, call, self._run, now_s())
        async with self._session.post(url, json=body, headers=headers) as response:
            if response.status != 200:
                text = await response.text()
                if response.status not in _REFUSED:
                    raise RuntimeError(f"{call.request_id}: {response.status} {text[:200]}")
                delivered.status = _REFUSED[response.status]
                return
            if body["stream"]:
                await self._read_stream(response, delivered, now_s)
            else:
                answer = json.loads(await response.read())
                delivered.tokens = int(answer["usage"]["completion_tokens"])
                delivered.times_s = [now_s()]
        delivered.end()

    async def _read_stream(
        self, response: aiohttp.ClientResponse, delivered: Delivered, now_s: Callable[[], float]
    ) -> None:
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            choices = event.get("choices") or []
            tokens = len(choices[0].get("token_ids") or ()) if choices else 0
            if tokens:
                delivered.tokens += tokens
                delivered.times_s.extend([now_s()] * tokens)

    def _body(self, unit: Unit, call: TraceCall, at_s: float) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._target.model,
            "prompt": prompt_of(call),
            "max_tokens": call.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": False,
        }
        if unit.tenant:
            body["user"] = unit.tenant
        if self._target.has_priorities:
            body["priority"] = priority_of(unit)
        match unit.slo:
            case Latency(ttft_s=ttft_s, tbt_s=tbt_s):
                slo = {"ttft_ms": 1000 * ttft_s, "tbt_ms": 1000 * tbt_s}
                return {**body, "stream": True, "return_token_ids": True, "slo": slo}
            case Deadline() if unit.is_program:
                # Its program's deadline, which its headers tell.
                return body
            case Deadline(ttlt_s=ttlt_s):
                left_s = unit.arrival_s + ttlt_s - at_s
                return {**body, "slo": {"ttlt_ms": max(1.0, 1000 * left_s)}}
            case _:
                return {**body, "service_tier": "flex"}


def program_name(unit: Unit, run: uuid.UUID) -> str:
    """A program's name in one run, unlike that in any other: a service remembers programs that are over."""
    return uuid.uuid5(run, unit.unit_id).hex


def headers_of(unit: Unit, call: TraceCall, run: uuid.UUID, at_s: float) -> dict[str, str]:
    """What a call says of its application and of its place in its program. at_s: now, on the clock of the trace."""
    headers = {"x-tempo-app": unit.app} if unit.app else {}
    if not unit.is_program:
        return headers
    headers["x-tempo-program"] = program_name(unit, run)
    headers["x-tempo-call"] = f"call-{unit.calls.index(call)}"
    headers["x-tempo-stage"] = str(call.stage)
    if call.parents:
        headers["x-tempo-parents"] = ",".join(f"call-{parent}" for parent in call.parents)
    if isinstance(unit.slo, Deadline):
        headers["x-tempo-deadline"] = f"{time.time() + unit.arrival_s + unit.slo.ttlt_s - at_s:.3f}"
    return headers


def priority_of(unit: Unit) -> int:
    """vLLM's `priority`, lower first: when the first token, or else the whole, is due, in ms of the trace's clock."""
    match unit.slo:
        case Latency(ttft_s=due_s) | Deadline(ttlt_s=due_s):
            return round(1000 * (unit.arrival_s + due_s))
        case _:
            return round(1000 * unit.arrival_s) + _BEST_EFFORT_PRIORITY


def prompt_of(call: TraceCall) -> list[int]:
    """Token ids: those of one prefix id begin alike, all else is unlike."""
    shared = min(call.prefix_tokens, call.prompt_tokens - 1) if call.prefix_id else 0
    common, own = random.Random(call.prefix_id), random.Random(call.request_id)
    tokens = [_FIRST_TOKEN + common.randrange(_TOKEN_KINDS) for _ in range(shared)]
    return tokens + [_FIRST_TOKEN + own.randrange(_TOKEN_KINDS) for _ in range(call.prompt_tokens - shared)]


def _report(trace: Trace, units: Sequence[_UnitClient], duration_s: float) -> Report:
    gaps = [gap for unit in units for gap in unit.gaps_s()]
    outcomes = [unit.outcome() for unit in units]
    return Report(
        units=outcomes,
        stream_gaps_s=np.concatenate(gaps) if gaps else np.zeros(0),
        duration_s=duration_s,
        arrival_span_s=trace.span_s,
        steps=0,
        preemptions=0,
        recomputed_tokens=0,
        produced_tokens=sum(outcome.output_tokens for outcome in outcomes),
        prefix_hit_tokens=0,
    )
