"""Open-loop clients of a served application: a trace is replayed in real time, and every token is timed.

Requests are sent when the trace says so, whatever became of those before. Lengths are forced: prompts are made-up token
ids of the trace's lengths (equal beginnings for equal prefix ids), answers end where the trace's end. Streams are
streamed; answers with a deadline are asked for whole; a program's call carries the time that is left to its program.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import aiohttp
import numpy as np

from tempo_router.request import Deadline, Latency, slo_class
from tempo_router.simulation.report import CallDelivery, Report, Status, UnitOutcome, unit_outcome
from tempo_router.simulation.trace import Trace, TraceCall, Unit

_FIRST_TOKEN, _TOKEN_KINDS = 97, 26
"""Token ids of small letters in tempo-tiny; any model has these ids."""
_REFUSED = {429: "refused", 503: "refused", 504: "expired"}
_TIMEOUT_S = 600.0


@dataclass(slots=True)
class Delivered:
    """One call as its client saw it. times_s: of each token for streams, of the whole answer otherwise."""

    call: TraceCall
    times_s: list[float] = field(default_factory=list)
    tokens: int = 0
    status: Status = "cut"


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go. url: without the path. model: as the server calls it."""

    url: str
    model: str


class Sender(Protocol):
    """The way to the server."""

    async def send(self, unit: Unit, call: TraceCall, delivered: Delivered, now_s: Callable[[], float]) -> None:
        """Send a call, wait for its end and note what came in `delivered`. now_s: the clock of the trace."""
        ...


async def replay_http(trace: Trace, target: Target, *, limit_s: float) -> Report:
    """`replay` over HTTP."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        return await replay(trace, HttpSender(target, session), limit_s=limit_s)


async def replay(trace: Trace, sender: Sender, *, limit_s: float) -> Report:
    """Send the trace and judge what comes back. limit_s: after the last arrival; what is open then is cut off."""
    began_s = time.perf_counter()
    units = [_UnitClient(unit, sender, began_s) for unit in trace.units]
    tasks = [asyncio.create_task(unit.run()) for unit in units]
    await asyncio.wait(tasks, timeout=trace.span_s + limit_s)
    for task in tasks:
        task.cancel()
    failures = [one for one in await asyncio.gather(*tasks, return_exceptions=True) if isinstance(one, Exception)]
    if failures:
        raise failures[0]
    return _report(trace, units, time.perf_counter() - began_s)


class _UnitClient:
    """One client with its unit: sends calls when those before them have ended and their tools have run."""

    def __init__(self, unit: Unit, sender: Sender, began_s: float) -> None:
        self.unit = unit
        self.delivered: dict[int, Delivered] = {}
        self._sender = sender
        self._began_s = began_s

    async def run(self) -> None:
        """From its arrival to the end of its last call, or of the first that is refused."""
        await self._sleep_until(self.unit.arrival_s)
        ended: dict[int, asyncio.Task[bool]] = {}
        for position, call in enumerate(self.unit.calls):
            ended[position] = asyncio.create_task(self._after_parents(call, position, ended))
        try:
            await asyncio.gather(*ended.values())
        finally:
            for task in ended.values():
                task.cancel()

    @property
    def status(self) -> Status:
        """That of its first call which did not finish; cut if a call was never sent."""
        if len(self.delivered) < len(self.unit.calls):
            unfinished = [one.status for one in self.delivered.values() if one.status != "finished"]
            return unfinished[0] if unfinished else "cut"
        return next((one.status for one in self.delivered.values() if one.status != "finished"), "finished")

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


class HttpSender:
    """Over HTTP, as any client of the OpenAI API."""

    def __init__(self, target: Target, session: aiohttp.ClientSession) -> None:
        self._target = target
        self._session = session

    async def send(self, unit: Unit, call: TraceCall, delivered: Delivered, now_s: Callable[[], float]) -> None:
        """One request to /v1/completions."""
        body = self._body(unit, call, now_s())
        headers = {"x-tempo-app": unit.app} if unit.app else {}
        url = f"{self._target.url}/v1/completions"
        async with self._session.post(url, json=body, headers=headers) as response:
            if response.status != 200:
                text = await response.text()
                if response.status not in _REFUSED:
                    raise RuntimeError(f"{call.request_id}: {response.status} {text[:200]}")
                delivered.status = _REFUSED[response.status]  # type: ignore[assignment]
                return
            if body["stream"]:
                await self._read_stream(response, delivered, now_s)
            else:
                answer = json.loads(await response.read())
                delivered.tokens = int(answer["usage"]["completion_tokens"])
                delivered.times_s = [now_s()]
        delivered.status = "finished" if delivered.tokens == call.output_tokens else "expired"

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
        body = {
            "model": self._target.model,
            "prompt": prompt_of(call),
            "max_tokens": call.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": False,
        }
        if unit.tenant:
            body["user"] = unit.tenant
        match unit.slo:
            case Latency(ttft_s=ttft_s, tbt_s=tbt_s):
                slo = {"ttft_ms": 1000 * ttft_s, "tbt_ms": 1000 * tbt_s}
                return {**body, "stream": True, "return_token_ids": True, "slo": slo}
            case Deadline(ttlt_s=ttlt_s):
                left_s = unit.arrival_s + ttlt_s - at_s
                return {**body, "slo": {"ttlt_ms": max(1.0, 1000 * left_s)}}
            case _:
                return {**body, "service_tier": "flex"}


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
