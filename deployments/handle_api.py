"""Types of the Python handle: what a caller sends to the ingress and gets back. Light to import: no vLLM, no Ray.

handle = serve.get_app_handle("tempo")
answer = await handle.generate.remote(GenerateRequest(prompt="Hi", slo=Deadline(ttlt_s=5)))
async for part in handle.options(stream=True).stream.remote(GenerateRequest(messages=[...], slo=Latency(1, 0.1))):
    print(part.text, end="")
await handle.cancel.remote(request_id)

program = await handle.create_program.remote(NewProgram(deadline_s=60, app="research"))
answer = await handle.generate.remote(GenerateRequest(prompt="Plan", program=ProgramPlace(program["id"], stage="plan")))
await handle.finish_program.remote(program["id"])      # and: program, programs, extend_program, cancel_program
explanation = await handle.explain.remote(answer.call_id)
"""

from dataclasses import dataclass, field
from typing import Any

from tempo_router.metrics import Outcome
from tempo_router.request import Slo


@dataclass(frozen=True, slots=True)
class NewProgram:
    """A program to be made: a deadline in seconds from now, or as a date (seconds since the epoch).

    objective: "deadline", or "best_effort" without one. graph: a declared graph, for `run_program`. outline: what is
    known of the stages of a program whose calls you make yourself (docs/programs.md).
    """

    deadline_s: float | None = None
    deadline: float | None = None
    app: str = ""
    name: str = ""
    objective: str = "deadline"
    tenant: str = ""
    graph: dict[str, Any] | None = None
    outline: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ProgramPlace:
    """Which call of which program this is: `program` is an id, or a name of your own that need not exist yet.

    stage: a number, or what you call the step. parents: calls that it follows. deadline_s, deadline: for a program that
    is new, in seconds from now or as a date.
    """

    program: str
    stage: int | str | None = None
    parents: tuple[str, ...] = ()
    call: str = ""
    attempt: int = 0
    agent: str = ""
    deadline_s: float | None = None
    is_last: bool = False
    deadline: float | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One call of the model. Give `prompt` (text or token ids) or `messages` (a chat), not both.

    slo: targets; or name a tier of the configuration; neither: the default tier.
    sampling: fields of vLLM's SamplingParams, such as max_tokens and temperature.
    request_id: your own name for it, for `cancel`; "" lets the ingress choose one.
    program: its place in a program, whose deadline it then has, unless it names its own targets.
    """

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    slo: Slo | None = None
    tier: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    request_id: str = ""
    app: str = ""
    tenant: str = ""
    program: ProgramPlace | None = None


@dataclass(frozen=True, slots=True)
class GenerationPart:
    """New text and tokens of a stream. finish_reason and outcome are set on the last part alone.

    call_id: names the call in its program. is_relegated: as of now its target, or its program's deadline, is out of
    reach; False again if the program is given more time.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    outcome: Outcome | None = None
    call_id: str = ""
    is_relegated: bool = False


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer. outcome: the times as the ingress measured them, and whether the SLO was met.

    call_id: names the call in its program, for its children's `parents`. is_relegated: its target, or its program's
    deadline, was out of reach in the end.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    outcome: Outcome
    call_id: str = ""
    is_relegated: bool = False
