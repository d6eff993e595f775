"""vLLM as a Tempo engine: its core runs in a thread of this process, this is its side on the event loop.

Requests go to the core through a queue (vllm_core.py); its output thread encodes what leaves and hands it to the event
loop, one call per engine step. Who runs in a step is Tempo's own decision where a `scheduling` is given
(tempo_scheduler.py), else vLLM's by priority. Who uses which of vLLM's names: vllm_check.py.
"""

import asyncio
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from tempo_router.config import SchedulingConfig
from tempo_router.errors import ConfigError, EngineStartError, EngineVersionError, TempoError
from tempo_router.events import FinishReason, ReplicaLoad, StepReport
from workers.calibration import Calibration, CalibrationFile, measure
from workers.call_facts import News
from workers.engine import ClientOutputs, EngineCall, EngineFacts, EngineFinished, EngineStep, OnDeath, OnStep

try:
    from vllm import SamplingParams
    from vllm.platforms import current_platform
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.engine import FinishReason as VllmFinishReason
    from vllm.v1.serial_utils import MsgpackEncoder

    from workers.vllm_core import NOBODY, STOP_TIMEOUT_S, Abort, Aborted, Add, Core, StepDone, Utility, check_vllm
    from workers.vllm_payload import encoded, encoded_request
    from workers.vllm_start import build_core, engine_arguments
except ImportError as e:
    raise EngineVersionError(f"vLLM cannot be used: {e}; install one of the tested versions (see README)") from e

log = structlog.get_logger()

# A thread that wants the interpreter waits this long before it asks the one that computes to let go; Python's default
# is 5 ms. Measured on two cores, tempo-tiny, 8 alternating runs each, medians: with 64 streams the event loop's lag
# was p99 3.6 ms, worst 6.4 ms with 5 ms and p99 2.0 ms, worst 4.2 ms with 0.5 ms; with 1 stream the same; tokens/s
# within noise (8369 and 8321; 302 and 278).
_SWITCH_INTERVAL_S = 0.0005

_FINISH_REASONS: Mapping[Any, FinishReason] = {
    VllmFinishReason.STOP: "completed",
    VllmFinishReason.LENGTH: "completed",
    VllmFinishReason.REPETITION: "completed",
    VllmFinishReason.ABORT: "cancelled",
    VllmFinishReason.ERROR: "error",
}


class VllmEngine:
    """vLLM behind the `Engine` protocol. Made by `start_vllm_engine`."""

    def __init__(
        self,
        model: str,
        arguments: Mapping[str, Any],
        on_step: OnStep,
        on_death: OnDeath,
        scheduling: SchedulingConfig | None = None,
        known: Calibration | None = None,
    ) -> None:
        self._known = known
        self._model = model
        self._arguments = arguments
        self._scheduling = scheduling
        self._on_step = on_step
        self._on_death = on_death
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="vllm-engine", daemon=True)
        self._core: Core | None = None
        self._facts: EngineFacts | None = None
        self._is_stopping = False
        self._stopping: asyncio.Task[None] | None = None
        self._live: dict[str, str] = {}
        self._client_indexes: dict[str, int] = {}
        self._clients: list[str] = [""]  # by index; index 0 is nobody
        self._utilities: dict[int, asyncio.Future[tuple[bytes, ...]]] = {}
        self._next_call_id = 1
        self._death: str | None = None
        self._load: ReplicaLoad | None = None
        self._encoder = MsgpackEncoder()  # output thread only

    @property
    def death(self) -> str | None:
        """Why it died; None while it has not."""
        return self._death

    @property
    def calibration(self) -> Calibration:
        """What the steps cost, as far as is known. Only where steps are planned."""
        step_planner = self._live_core.step_planner
        if step_planner is None:
            raise TempoError("only planned steps are calibrated")
        steps = step_planner.steps
        return Calibration(steps.coefficients, steps.upper_ratio, steps.relative_error, steps.observed)

    async def start(self) -> None:
        """Load the model in the engine's thread. Raises ConfigError or EngineStartError."""
        self._thread.start()
        try:
            await asyncio.shield(self._started)
        except asyncio.CancelledError:
            self._is_stopping = True  # the thread ends by itself once it is up
            raise

    # -- the protocol --

    @property
    def facts(self) -> EngineFacts:
        """Fixed from the start."""
        if self._facts is None:
            raise TempoError("the engine has not started")
        return self._facts

    def submit(self, call: EngineCall) -> None:
        """Queue a request; decoding happens in the input thread."""
        if call.request_id in self._live:
            self._loop.call_soon(self._refuse_duplicate, call)
            return
        self._live[call.request_id] = call.client
        self._live_core.inbox.put(Add(call, self._client_index(call.client)))

    def abort(self, request_ids: Sequence[str]) -> None:
        """Stop these. Their clients get no output: whoever aborts knows."""
        live = [request_id for request_id in request_ids if request_id in self._live]
        if live:
            self._live_core.inbox.put(Abort(live))

    def tell(self, news: News) -> None:
        """The scheduler reads it before its next step."""
        step_planner = self._live_core.step_planner
        if step_planner is not None:
            step_planner.tell(news)

    async def call_utility(self, call: bytes) -> tuple[bytes, ...]:
        """Run a method of the engine core. `call`: msgpack (name, arguments); the answer: vLLM's UtilityOutput."""
        if self._is_stopping or not self._thread.is_alive():
            raise TempoError("the engine has stopped")
        call_id = self._next_call_id
        self._next_call_id += 1
        answer: asyncio.Future[tuple[bytes, ...]] = self._loop.create_future()
        self._utilities[call_id] = answer
        self._live_core.inbox.put(Utility(call_id, call))
        try:
            return await answer
        finally:
            del self._utilities[call_id]

    def live_requests(self) -> tuple[str, ...]:
        """Submitted and not finished."""
        return tuple(self._live)

    async def shutdown(self) -> None:
        """Stop the engine; running requests are reported as cancelled."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        self._is_stopping = True
        if self._core is not None:
            self._core.request_stop()
        await asyncio.to_thread(self._thread.join, STOP_TIMEOUT_S)
        if self._thread.is_alive() and self._core is not None:
            log.error("engine_does_not_stop", waited_s=STOP_TIMEOUT_S)
            await asyncio.to_thread(self._core.model_executor.shutdown)
        self._fail_utilities("the engine has stopped")

    @property
    def _live_core(self) -> Core:
        if self._core is None:
            raise TempoError("the engine has not started")
        return self._core

    def _client_index(self, client: str) -> int:
        index = self._client_indexes.get(client)
        if index is None:
            index = self._client_indexes[client] = len(self._clients)
            self._clients.append(client)
        return index

    # -- the engine's thread --

    def _run(self) -> None:
        try:
            self._core = core = build_core(self._arguments, self._scheduling, self._known, self._publish)
            self._facts = core.facts(self._model)
            self._load = ReplicaLoad(running=0, waiting=0, free_kv_tokens=self._facts.kv_tokens)
        except ConfigError as e:
            self._call_on_loop(_settle, self._started, e)
            return
        except (Exception, SystemExit) as e:  # noqa: BLE001 - the reason travels on in the EngineStartError
            problem = EngineStartError(f"vLLM could not start with model {self._model!r}: {_reason(e)}")
            problem.__cause__ = e
            self._call_on_loop(_settle, self._started, problem)
            return
        self._call_on_loop(_settle, self._started, None)
        self._run_core(core)

    def _run_core(self, core: Core) -> None:
        death = None
        try:
            if self._is_stopping:
                core.request_stop()
            core.run_busy_loop()
        except SystemExit:
            pass  # how the busy loop says that it was asked to end
        except Exception as e:
            log.exception("engine_failed")
            death = _reason(e)
        try:
            core.shutdown()
        except Exception:
            log.exception("engine_teardown_failed")
        core.close_threads()
        if death is not None:
            self._call_on_loop(self._die, death)

    def _call_on_loop(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            log.debug("event_loop_closed_before_engine")  # the process is ending

    # -- the output thread --

    def _publish(self, item: Any) -> None:
        match item:
            case StepDone(outputs, report, load, preempted):
                self._load = load
                step = replace(self._step_of(outputs, load, report), preempted=preempted)
                self._call_on_loop(self._deliver, step)
            case Aborted(request_ids, load):
                self._load = load
                finished = tuple(EngineFinished(request_id, "cancelled") for request_id in request_ids)
                self._call_on_loop(self._deliver, EngineStep(load=load, finished=finished))
            case (client_index, outputs):
                if outputs.utility_output is not None:
                    self._publish_utility(outputs.utility_output)
                else:
                    self._call_on_loop(self._deliver, self._step_of({client_index: outputs}, self._known_load, None))

    @property
    def _known_load(self) -> ReplicaLoad:
        assert self._load is not None, "outputs come only from an engine that has started"
        return self._load

    def _step_of(self, by_client: Mapping[int, Any], load: ReplicaLoad, report: StepReport | None) -> EngineStep:
        tokens = []
        finished = []
        outputs = {}
        for client_index, group in by_client.items():
            for output in group.outputs:
                if output.new_token_ids:
                    tokens.append((output.request_id, len(output.new_token_ids)))
                if output.finish_reason is not None:
                    finished.append(EngineFinished(output.request_id, _FINISH_REASONS[output.finish_reason]))
            # Statistics of a step without outputs go to whoever came last: somebody should count them.
            client = self._clients[client_index] if client_index != NOBODY else self._clients[-1]
            if client:
                outputs[client] = ClientOutputs(buffers=encoded(group, self._encoder))
        return EngineStep(load=load, step=report, tokens=tuple(tokens), finished=tuple(finished), outputs=outputs)

    def _publish_utility(self, output: Any) -> None:
        try:
            payload, failure = encoded(output, self._encoder), output.failure_message
        except Exception as e:  # noqa: BLE001 - a result of any type may come back; the caller hears of it
            payload, failure = (), f"the result cannot be sent: {e}"
        self._call_on_loop(self._settle_utility, output.call_id, payload, failure)

    # -- the event loop --

    def _deliver(self, step: EngineStep) -> None:
        if step.finished:
            # Once each: an abort and the natural end may both be reported.
            once = tuple(end for end in step.finished if self._live.pop(end.request_id, None) is not None)
            if len(once) != len(step.finished):
                step = replace(step, finished=once)
        self._on_step(step)

    def _refuse_duplicate(self, call: EngineCall) -> None:
        """The live one goes on; only a client that does not own it hears of the error."""
        log.warning("engine_request_duplicate", request_id=call.request_id)
        outputs = {}
        if self._live.get(call.request_id) != call.client:
            refusal = EngineCoreOutput(call.request_id, [], finish_reason=VllmFinishReason.ERROR)
            outputs[call.client] = ClientOutputs(encoded(EngineCoreOutputs(outputs=[refusal]), MsgpackEncoder()))
        finished = (EngineFinished(call.request_id, "error"),)
        self._on_step(EngineStep(load=self._known_load, finished=finished, outputs=outputs))

    def _settle_utility(self, call_id: int, payload: tuple[bytes, ...], failure: str | None) -> None:
        answer = self._utilities.get(call_id)
        if answer is None or answer.done():
            return
        if failure is None:
            answer.set_result(payload)
        else:
            answer.set_exception(TempoError(failure))

    def _fail_utilities(self, reason: str) -> None:
        for answer in self._utilities.values():
            if not answer.done():
                answer.set_exception(TempoError(reason))

    def _die(self, reason: str) -> None:
        self._death = reason
        self._fail_utilities(f"the engine died: {reason}")
        self._on_death(reason)


async def start_vllm_engine(
    model: str,
    engine_kwargs: Mapping[str, Any],
    *,
    on_step: OnStep,
    on_death: OnDeath,
    scheduling: SchedulingConfig | None = None,
    calibrations: Path | None = None,
) -> VllmEngine:
    """Start vLLM in a thread of this process and return when it can take requests.

    scheduling: plan every step by this policy; None leaves the steps to vLLM.
    calibrations: folder of what was measured of planned steps; what is not there is measured now. None: neither.

    engine_kwargs: vLLM's engine arguments, as in `vllm serve`, with underscores. What is not given comes from vLLM,
    except `scheduling_policy` ("priority") and, on a CPU, what `_cpu_defaults` says.
    Where steps cannot be planned, vLLM's priority policy composes them, and a warning says why.
    Raises EngineVersionError (serving lacks something of vLLM), ConfigError (an argument that does not exist),
    EngineStartError with the reason.
    """
    check_vllm()
    if sys.getswitchinterval() > _SWITCH_INTERVAL_S:
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
    arguments = engine_arguments(model, engine_kwargs)
    file = None
    if calibrations is not None and scheduling is not None:
        file = CalibrationFile(
            calibrations, model=model, device=current_platform.get_device_name(), arguments=dict(arguments)
        )
    known = file.load() if file is not None else None
    engine = VllmEngine(model, arguments, on_step, on_death, scheduling, known)
    await engine.start()
    if file is not None and known is None and engine.facts.has_step_planner:
        await _calibrate(engine, file)
    return engine


async def _calibrate(engine: VllmEngine, file: CalibrationFile) -> None:
    """Measure and keep. An engine that cannot be measured still serves: it learns from its requests.

    Raises EngineStartError if it died of it.
    """
    began_s = time.monotonic()
    try:
        swept = await measure(engine, _made_up_request, lambda: engine.death)
        found = engine.calibration
        if swept.points:
            file.save(found)
    except (TimeoutError, OSError) as error:
        log.warning("calibration_failed", problem=repr(error), effect="step times are learnt from requests alone")
        return
    log.info(
        "calibrated",
        points=swept.points,
        planned_points=swept.planned,
        seconds=round(time.monotonic() - began_s, 1),
        steps=found.steps,
        relative_error=round(found.relative_error, 3),
        path=str(file.path),
    )


def _made_up_request(request_id: str, prompt_tokens: int, answer_tokens: int) -> tuple[bytes, ...]:
    """Greedy, as long as it may be; its prompt is its own, so that no cache has it."""
    rng = random.Random(request_id)
    params = SamplingParams(max_tokens=answer_tokens, ignore_eos=True, temperature=0.0)
    prompt = [rng.randrange(1, 200) for _ in range(prompt_tokens)]
    return encoded_request(request_id, prompt, params)


def _settle(started: "asyncio.Future[None]", problem: BaseException | None) -> None:
    if started.done():
        return
    if problem is None:
        started.set_result(None)
    else:
        started.set_exception(problem)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
