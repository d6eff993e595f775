"""Why a request was served as it was: the last few thousand requests with every decision about them.

A record begins with the arrival and what was estimated then, collects what the core and the engines decided, and ends
with what the client saw. Ring buffer: the oldest are forgotten. Times are seconds since the request's arrival.
"""

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any, Literal, assert_never

from tempo_router.actions import (
    Abort,
    Action,
    Admit,
    Defer,
    DeferReason,
    Dispatch,
    Evict,
    Expire,
    Readmit,
    Redate,
    Reject,
    Relegate,
    Retarget,
    Retune,
)
from tempo_router.metrics import Outcome
from tempo_router.prediction import Lengths
from tempo_router.request import (
    BestEffort,
    Deadline,
    DispatchId,
    Latency,
    ProgramCall,
    ReplicaId,
    RequestId,
    RequestSpec,
    Slo,
)
from tempo_router.request import slo_class as class_of

QUANTILES = (0.1, 0.5, 0.9)
_MOST_DECISIONS = 64
_MOST_TURNS = 8
"""Times that a request is told to be deferred or admitted again: a plan may change its mind many times a second."""

_WHY_DEFERRED: dict[DeferReason, str] = {
    "no_room": "the plan has no room for it; it fills what is spare",
    "no_worth": "by the estimates nothing of it can be in time; it fills what is spare",
}


@dataclass(slots=True)
class Explanation:
    """One request. cost_s, density: as estimated at its arrival. outcome: None while it is open.

    turns: how often a plan deferred it or admitted it again.
    """

    spec: RequestSpec
    output_quantiles: tuple[float, ...]
    cost_s: float
    density: float
    decisions: list[dict[str, Any]] = field(default_factory=list)
    turns: int = 0
    outcome: Outcome | None = None

    def add(self, at_s: float, what: str, **why: Any) -> None:
        """A decision about it; of very many only the first and the last are kept."""
        if len(self.decisions) >= _MOST_DECISIONS:
            del self.decisions[_MOST_DECISIONS // 2]
        self.decisions.append({"at_s": round(at_s - self.spec.arrival_s, 4), "what": what, **why})

    def turned(self, at_s: float, what: Literal["deferred", "admitted"], why: str) -> None:
        """A plan deferred it or admitted it again; of many such turns only the first ones and the last are kept."""
        self.turns += 1
        if self.turns <= _MOST_TURNS:
            self.add(at_s, what, reason=why)
            return
        positions = range(len(self.decisions) - 1, -1, -1)
        last = next((at for at in positions if self.decisions[at]["what"] in ("deferred", "admitted")), None)
        if last is not None:
            del self.decisions[last]
        self.add(at_s, what, reason=why, turn=self.turns)

    def shown(self) -> dict[str, Any]:
        """As clients and logs see it."""
        spec, outcome = self.spec, self.outcome
        return {
            "id": spec.request_id,
            "class": class_of(spec.slo),
            "tier": spec.tier,
            "app": spec.app,
            "program": spec.program_id,
            "call": spec.call_id,
            "stage": spec.stage,
            "targets_s": targets_s(spec.slo),
            "prompt_tokens": spec.prompt_tokens,
            "prefix_tokens": spec.prefix_tokens,
            "max_output_tokens": spec.max_output_tokens,
            "estimated_output_tokens": {
                str(share): min(tokens, spec.max_output_tokens)
                for share, tokens in zip(QUANTILES, self.output_quantiles, strict=True)
            },
            "estimated_gpu_s": round(self.cost_s, 4),
            "density": round(self.density, 3),
            "decisions": self.decisions,
            "is_open": outcome is None and self.decisions[-1]["what"] != "rejected",
            "slo_met": None if outcome is None else outcome.is_met,
            "missed_by_s": None if outcome is None else missed_by_s(spec.slo, outcome),
            "ttft_s": None if outcome is None else outcome.ttft_s,
            "ttlt_s": None if outcome is None else outcome.ttlt_s,
            "output_tokens": None if outcome is None else outcome.output_tokens,
            "late_tokens": None if outcome is None else outcome.late_tokens,
        }


class DecisionLog:
    """Explanations by request. most: how many are kept."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[RequestId, Explanation] = OrderedDict()
        self._dispatched: dict[DispatchId, RequestId] = {}

    def __len__(self) -> int:
        return len(self._known)

    def arrived(self, spec: RequestSpec, lengths: Lengths, cost_s: float, density: float, at_s: float) -> None:
        """A request came, or came again with a higher attempt."""
        known = self._known.get(spec.request_id)
        if known is not None:
            known.add(at_s, "resubmitted", attempt=spec.attempt, generated_tokens=spec.generated_tokens)
            return
        atoms = lengths.atoms
        quantiles = tuple(round(float(atoms[min(int(share * len(atoms)), len(atoms) - 1)])) for share in QUANTILES)
        record = self._known[spec.request_id] = Explanation(spec, quantiles, cost_s, density)
        record.add(at_s, "arrived")
        if len(self._known) > self._most:
            self._known.popitem(last=False)

    def decided(self, action: Action, at_s: float) -> None:  # noqa: C901  # one case per action
        """The core decided something."""
        if isinstance(action, Retune):
            return
        record = self._record_of(action)
        if record is None:
            return
        match action:
            case Admit():
                wait_s, chance = round(action.expected_wait_s, 4), round(action.success_probability, 4)
                record.add(at_s, "queued", expected_wait_s=wait_s, success_probability=chance)
            case Reject():
                record.add(at_s, "rejected", reason=action.reason, retry_after_s=action.retry_after_s)
            case Dispatch():
                self._note_dispatch(record, action, at_s)
            case Defer():
                record.turned(at_s, "deferred", _WHY_DEFERRED[action.reason])
            case Readmit():
                record.turned(at_s, "admitted", "the plan has room for it again")
            case Relegate():
                record.add(at_s, "relegated", reason="its target is out of reach; it goes on as best effort")
            case Expire():
                record.add(at_s, "expired", reason="its target is out of reach and hopeless work is refused")
            case Evict():
                record.add(at_s, "evicted", reason="the attempt was lost with its worker", attempt=action.attempt)
            case Abort():
                record.add(at_s, "aborted", replica=action.replica_id)
            case Retarget():
                record.add(at_s, "retargeted", replica=action.replica_id, reason="its program's deadline moved")
            case Redate():
                ttlt_s = action.deadline_s - record.spec.arrival_s
                record.spec = replace(record.spec, slo=ProgramCall(action.program_id, ttlt_s))
                why = "its program's deadline moved; it counts again if it had been given up"
                record.add(at_s, "redated", ttlt_s=round(ttlt_s, 3), reason=why)
            case _:
                assert_never(action)

    def preempted(self, dispatch_id: DispatchId, replica_id: ReplicaId, at_s: float) -> None:
        """An engine took the cache of a call that it was computing."""
        request_id = self._dispatched.get(dispatch_id)
        record = self._known.get(request_id) if request_id is not None else None
        if record is not None:
            why = "its engine had no room in the KV cache for it and for what comes first; it is computed again"
            record.add(at_s, "preempted", replica=replica_id, reason=why)

    def _record_of(
        self,
        action: Admit | Reject | Dispatch | Abort | Relegate | Expire | Evict | Retarget | Redate | Defer | Readmit,
    ) -> Explanation | None:
        match action:
            case Abort(dispatch_id=dispatch_id):
                request_id = self._dispatched.pop(dispatch_id, None)
            case Retarget(dispatch_id=dispatch_id):
                request_id = self._dispatched.get(dispatch_id)
            case _:
                request_id = action.request_id
        return None if request_id is None else self._known.get(request_id)

    def ended(self, request_id: RequestId, outcome: Outcome, at_s: float) -> Explanation | None:
        """Its ingress says how it ended. Returns the record, if it is still kept."""
        record = self._known.get(request_id)
        if record is None or record.outcome is not None:
            return None
        record.outcome = outcome
        record.add(at_s, "ended")
        return record

    def find(self, name: str, tenant: str) -> list[Explanation]:
        """Those that a client means: by the id in its response, our own id, its group's, or its call's in a program."""
        exact = self._known.get(RequestId(name))
        found = [exact] if exact is not None else [one for one in self._known.values() if _is_called(one.spec, name)]
        return [one for one in found if one.spec.tenant == tenant]

    def _note_dispatch(self, record: Explanation, action: Dispatch, at_s: float) -> None:
        self._dispatched[action.dispatch_id] = action.request_id
        if len(self._dispatched) > 2 * self._most:
            del self._dispatched[next(iter(self._dispatched))]
        standing = action.standing
        why: dict[str, Any] = {"replica": action.replica_id, "priority": action.priority}
        if standing.density:
            why |= {"density": round(standing.density, 3), "later_stages_s": round(standing.later_s, 3)}
        record.add(at_s, "dispatched", **why)


def targets_s(slo: Slo) -> dict[str, float]:
    """The targets by name, in seconds."""
    match slo:
        case Latency(ttft_s=ttft_s, tbt_s=tbt_s):
            return {"ttft": ttft_s, "tbt": tbt_s}
        case Deadline(ttlt_s=ttlt_s) | ProgramCall(ttlt_s=ttlt_s):
            return {"ttlt": ttlt_s}
        case BestEffort():
            return {}
        case _:
            assert_never(slo)


def missed_by_s(slo: Slo, outcome: Outcome) -> float | None:
    """By how many seconds a target was missed; None if it was met, or where nothing came that could be late.

    Of a stream: its first token's lateness if that was late, else how far its last token was behind the schedule.
    """
    if outcome.is_met is not False or outcome.ttlt_s is None or outcome.ttft_s is None:
        return None
    match slo:
        case Latency(ttft_s=ttft_s, tbt_s=tbt_s):
            first = outcome.ttft_s - ttft_s
            last = outcome.ttlt_s - (ttft_s + max(outcome.output_tokens - 1, 0) * tbt_s)
            return round(max(first, last, 0.0), 4)
        case Deadline(ttlt_s=ttlt_s) | ProgramCall(ttlt_s=ttlt_s):
            return round(max(outcome.ttlt_s - ttlt_s, 0.0), 4)
        case BestEffort():
            return None
        case _:
            assert_never(slo)


def _is_called(spec: RequestSpec, name: str) -> bool:
    """vLLM puts the kind of answer before an `x-request-id`, and behind it the index of a prompt and random digits."""
    if name in (spec.call_id, spec.group_id):
        return True
    for known in (spec.request_id, spec.group_id):
        for said in (known, known.removeprefix("chatcmpl-"), known.removeprefix("cmpl-")):
            if said.startswith(f"{name}-") and said.count("-") - name.count("-") <= _ADDED_PARTS:
                return True
    return False


_ADDED_PARTS = 2
