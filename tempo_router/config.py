"""All that can be set: one frozen tree, built once from `args` of serve_config.yaml.

Unknown keys are refused and the nearest valid one is proposed: Ray Serve itself would ignore them.
Units end the names. A description says whether a default was measured or guessed.
"""

import difflib
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tempo_router.request import BestEffort, Deadline, Latency


class StrictModel(BaseModel):
    """A frozen section of the configuration that names misspelt keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _propose_nearest_key(cls, values: Any) -> Any:
        if isinstance(values, dict):
            names = [field.alias or name for name, field in cls.model_fields.items()]
            for key in values:
                if key not in names and key not in cls.model_fields:
                    raise ValueError(unknown_key_message(str(key), names))
        return values


def unknown_key_message(key: str, valid: Any) -> str:
    """Say that a key is unknown, and which valid one it probably meant."""
    names = [str(name) for name in valid]
    nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if nearest:
        return f"unknown key {key!r}; did you mean {nearest[0]!r}?"
    return f"unknown key {key!r}; valid keys are {', '.join(sorted(names))}"


class TierConfig(StrictModel):
    """A named set of targets that a client chooses with `service_tier` or `slo.tier`."""

    slo_class: Literal["latency", "deadline", "best_effort"] = Field(
        alias="class", description="what a request of this tier is judged by"
    )
    ttft_ms: float | None = Field(None, gt=0, description="time to first token, class latency")
    tbt_ms: float | None = Field(None, gt=0, description="time between tokens, class latency")
    ttlt_ms: float | None = Field(None, gt=0, description="time to last token, class deadline")

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)

    @model_validator(mode="after")
    def _targets_fit_the_class(self) -> Self:
        wanted = {
            "latency": ("ttft_ms", "tbt_ms"),
            "deadline": ("ttlt_ms",),
            "best_effort": (),
        }[self.slo_class]
        for name in ("ttft_ms", "tbt_ms", "ttlt_ms"):
            value = getattr(self, name)
            if name in wanted and value is None:
                raise ValueError(f"a tier of class {self.slo_class!r} needs {name}")
            if name not in wanted and value is not None:
                raise ValueError(f"{name}={value} has no meaning for a tier of class {self.slo_class!r}")
        return self

    def slo(self) -> Latency | Deadline | BestEffort:
        """The tier's targets in seconds."""
        if self.ttft_ms is not None and self.tbt_ms is not None:
            return Latency(ttft_s=self.ttft_ms / 1000, tbt_s=self.tbt_ms / 1000)
        if self.ttlt_ms is not None:
            return Deadline(ttlt_s=self.ttlt_ms / 1000)
        return BestEffort()


DEFAULT_TIERS: dict[str, TierConfig] = {
    "chat": TierConfig(slo_class="latency", ttft_ms=2000, tbt_ms=100),
    "interactive": TierConfig(slo_class="latency", ttft_ms=500, tbt_ms=50),
    "tool": TierConfig(slo_class="deadline", ttlt_ms=20_000),
    "background": TierConfig(slo_class="best_effort"),
}
DEFAULT_TIER = "chat"
# OpenAI's own values of `service_tier`, and Anthropic's, so that their clients work unchanged.
OPENAI_TIERS = {
    "auto": DEFAULT_TIER,
    "default": DEFAULT_TIER,
    "scale": DEFAULT_TIER,
    "standard_only": DEFAULT_TIER,
    "priority": "interactive",
    "flex": "background",
}


PolicyName = Literal[
    "fcfs",
    "edf",
    "class_priority",
    "density",
    "tempo",
    "vllm_fcfs",
    "class_fcfs",
    "edf_preemptive",
    "ltr",
    "srpt",
    "llmd",
    "qoserve",
    "hygen",
    "bros",
    "lsdf",
    "jitserve",
    "jitserve_tuned",
    "plas",
    "atlas",
    "vtc",
    "alise",
    "qlm",
    "slos_serve",
]


class SwitchesConfig(StrictModel):
    """Parts of Tempo's policy, each of which can be left out, to see what it is worth."""

    timeline: bool = Field(True, description="admit on the capacity timeline; off: everything, densest first")
    reserve: bool = Field(True, description="leave room for denser work that is still to come")
    urgency: bool = Field(True, description="order admitted work by urgency; off: by density alone")
    remaining_cost: bool = Field(True, description="count only the work that is left; off: the whole cost")
    look_ahead: bool = Field(True, description="count what is still to come of a program")
    step_cap: bool = Field(True, description="bound a step's duration; off: a fixed number of tokens")
    adaptive_cap: bool = Field(
        True, description="choose that bound by what recent arrivals would be worth under it; off: step_cap_share"
    )
    serial_demand: bool = Field(
        True, description="spread a chain's demand over the time from its latest start; off: all at its deadline"
    )
    commitment: bool = Field(
        True, description="start what counts only as a whole only once the plan has room for it, or a replica is idle"
    )
    gap_bound: bool = Field(True, description="never pause a stream for longer than its reader would notice")
    affinity: bool = Field(True, description="prefer the replica that has a request's prefix cached")


class SchedulingConfig(StrictModel):
    """Who goes first, who is refused, and how much of the queue the router keeps to itself."""

    policy: PolicyName = Field(
        "tempo", description="order of the queue; tempo plans over everything, density is its simple fallback"
    )
    hopeless: Literal["relegate", "refuse"] = Field(
        "relegate",
        description="what becomes of work that can no longer meet its SLO: go on as best effort, or end with an error",
    )
    request_weight: float = Field(
        0.75,
        ge=0,
        le=1,
        description="objective: 0 counts good tokens, 1 counts requests; between them a mix (measured in simulation)",
    )
    objective: Literal["mix", "gain"] = Field(
        "mix",
        description="mix: good tokens and requests by request_weight; gain: service gain, prompt tokens 1, output 8",
    )
    dag_weight: float = Field(
        4.0, ge=0, description="what a program counts among requests, in single requests (measured in simulation)"
    )
    capacity_factor: float = Field(0.7, gt=0, description="GPU time that a plan may fill, over what there is")
    reserve_factor: float = Field(1.0, ge=0, description="share of the denser work to come that a plan leaves room for")
    tenant_exponent: float = Field(
        0.0, ge=0, le=4, description="0: tenants do not matter; 1: the less served count for more"
    )
    step_cap_share: float = Field(
        0.3,
        gt=0,
        le=1,
        description="longest step, as a share of the tightest time between tokens served; with adaptive_cap where "
        "recent arrivals do not tell",
    )
    chunk_tokens: int | None = Field(
        None,
        gt=0,
        description="tokens of a step under policies that fill steps with pieces of prompts (not tempo), where Tempo "
        "composes them; null: 512",
    )
    plan_s: float = Field(0.5, gt=0, description="seconds between plans over the whole queue, without arrivals")
    switches: SwitchesConfig = SwitchesConfig()
    max_waiting_requests: int = Field(10_000, gt=0, description="beyond it requests get 429 (guessed)")
    max_waiting_tokens: int = Field(
        20_000_000, gt=0, description="prompt tokens of all waiting requests; beyond it requests get 429 (guessed)"
    )
    starvation_s: float = Field(
        120.0, gt=0, description="seconds after which waiting work of any class gets a trickle of slots (guessed)"
    )
    replica_queue_depth: int = Field(
        2, ge=0, description="calls sent to a replica beyond its free slots, to hide the round trip (guessed)"
    )
    settle_s: float = Field(
        0.5, ge=0, description="seconds after a router's start in which it only listens, so that replicas can attach"
    )
    program_model: Literal["stages", "patterns"] = Field(
        "stages",
        description="how the rest of a program is foretold; stages: by means of each stage of its application; "
        "patterns: by finished programs that looked alike so far",
    )
    length_model: Literal["auto", "histogram"] = Field(
        "auto",
        description="how answer lengths are estimated; histogram: by running histograms alone; auto: also by a forest "
        "in a process of its own, used for each app where it was the better one lately",
    )
    length_training_s: float = Field(
        30.0, gt=0, description="least seconds between two fits of the forest; a fit takes 0.3 s of CPU time (guessed)"
    )
    length_window: int = Field(
        4096, ge=200, le=100_000, description="recent answers that the forest learns from (guessed)"
    )
    tick_s: float = Field(0.05, gt=0, description="seconds between looks at the clock when nothing else happens")


class EngineConfig(StrictModel):
    """The engine inside a worker."""

    kind: Literal["vllm", "simulated"] = Field("vllm", description="simulated: no weights, step times from a profile")
    engine_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="vLLM's engine arguments, as in `vllm serve`, with underscores"
    )
    frontend_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="vLLM's API server arguments (chat_template, tool_call_parser, ...), with underscores",
    )
    step_planner: Literal["auto", "on", "off"] = Field(
        "auto",
        description="who composes vLLM's steps. on: Tempo, by the order of scheduling.policy; off: vLLM, by priority; "
        "auto: on with the policy tempo",
    )
    calibrate: bool = Field(
        False,
        description="measure what steps cost before the first request, some seconds, and keep it in data_dir by model, "
        "device and engine arguments; only where steps are planned",
    )
    profile: str = Field("toy-cpu", description="simulated engine: name of the step-time profile")
    profile_path: str | None = Field(None, description="simulated engine: a file with more profiles")
    time_scale: float = Field(1.0, gt=0, description="simulated engine: step times are multiplied by it")
    seed: int = Field(0, description="simulated engine: seed of answers and their lengths")


class WorkersConfig(StrictModel):
    """How many engines, and what each may use."""

    replicas: int = Field(1, ge=1, description="number of workers, each with an engine of its own")
    num_cpus: float = Field(0, ge=0, description="CPU cores that Ray reserves for one worker")
    num_gpus: float | None = Field(None, ge=0, description="GPUs of one worker; null: 1 for vLLM's CUDA build, else 0")
    drain_timeout_s: float = Field(
        60.0, ge=0, description="longest wait for running answers when a worker is stopped (guessed)"
    )
    env: dict[str, str] = Field(default_factory=dict, description="environment variables of the worker processes")


class IngressConfig(StrictModel):
    """The processes that talk to clients."""

    console: bool = Field(True, description="serve the page /console, which shows the programs of all tenants")
    explained_requests: int = Field(
        2000, ge=0, description="last requests of which /v1/requests/{id}/explain tells every decision"
    )

    replicas: int = Field(1, ge=1, description="number of ingress processes")
    num_cpus: float = Field(0, ge=0, description="CPU cores that Ray reserves for one ingress")
    max_body_bytes: int = Field(8 * 1024 * 1024, gt=0, description="larger request bodies get 413")
    max_open_requests: int = Field(
        4000,
        gt=0,
        description="HTTP requests that one ingress holds open at once; more get 503 (the default is what "
        "HAProxy takes, RAY_SERVE_HAPROXY_MAXCONN, less some for probes)",
    )
    router_wait_s: float = Field(
        30.0, gt=0, description="longest wait for a router before a new request gets 503 (guessed)"
    )
    drain_timeout_s: float = Field(60.0, ge=0, description="longest wait for open streams at the stop (guessed)")


IdentitySource = Literal["session", "openai", "trace", "prefix"]


class ProgramsConfig(StrictModel):
    """Programs: calls that share one deadline, and how they are recognised and remembered."""

    identify_by: tuple[IdentitySource, ...] = Field(
        ("session", "openai", "trace"),
        description="what tells, beside our own headers, which program a call belongs to: session and agent headers, "
        "OpenAI's conversation fields, W3C trace context, or a prompt that continues an earlier one",
    )
    max_programs: int = Field(100_000, gt=0, description="programs in progress; beyond it new ones get 503 (guessed)")
    keep_s: float = Field(
        600.0, gt=0, description="how long a program is kept after its deadline, or its last call without one (guessed)"
    )
    max_unwritten: int = Field(
        20_000,
        gt=0,
        description="changes of programs that wait while Redis is away; beyond it new programs get 503 (guessed)",
    )
    max_patterns: int = Field(5000, gt=0, le=100_000, description="finished programs that later ones are compared with")
    pattern_age_s: float = Field(
        14 * 24 * 3600.0, gt=0, description="older finished programs are no longer compared with (guessed)"
    )


class TransportConfig(StrictModel):
    """The gRPC streams between router, ingress and workers."""

    host: str | None = Field(
        None,
        description="address at which this node's processes reach each other; null: its address in Ray",
    )
    max_message_bytes: int = Field(64 * 1024 * 1024, gt=0, description="limit of one gRPC message, both ways")
    inline_payload_bytes: int = Field(
        64 * 1024,
        ge=0,
        description="requests up to this size go through the router; the worker fetches larger ones from the ingress",
    )
    keepalive_s: float = Field(10.0, gt=0, description="seconds between keepalive pings on an idle stream")
    keepalive_timeout_s: float = Field(5.0, gt=0, description="seconds without an answer after which a stream is dead")
    outbox_bytes: int = Field(
        64 * 1024 * 1024, gt=0, description="frames that a worker holds for one slow ingress before it drops the link"
    )
    attach_timeout_s: float = Field(
        5.0, gt=0, description="how long a worker holds frames for an ingress that has no token stream"
    )
    lease_s: float = Field(10.0, gt=0, description="life of the router's ownership lease in Redis")
    snapshot_s: float = Field(5.0, gt=0, description="seconds between writes of the learnt lengths to Redis")


class TempoConfig(StrictModel):
    """The whole application."""

    name: str = Field(
        "tempo",
        pattern=r"^[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?$",
        description="name of the application: Serve app, router actor, prefix of every Redis key",
    )
    model: str = Field("tempo-tiny", min_length=1, description="path or hub id; tempo-tiny is built on first use")
    served_model_name: str | None = Field(None, description="name that clients use; null: the value of `model`")
    data_dir: str = Field(".tempo", description="folder for the default model and the embedded Redis")
    redis_url: str | None = Field(
        None, description="null: TEMPO_REDIS_URL if it is set, else an embedded server in data_dir"
    )
    record_events: str | None = Field(
        None,
        description="file to which the router writes every event and decision, to be played again; its name gets the "
        "epoch. Request ids, lengths and targets, no text; about 1 kB per request and step. null: nothing is written",
    )
    tiers: dict[str, TierConfig] = Field(
        default_factory=lambda: dict(DEFAULT_TIERS), description="targets by name; these replace all default tiers"
    )
    default_tier: str = Field(DEFAULT_TIER, description="tier of requests that name none")
    scheduling: SchedulingConfig = SchedulingConfig()
    engine: EngineConfig = EngineConfig()
    workers: WorkersConfig = WorkersConfig()
    ingress: IngressConfig = IngressConfig()
    programs: ProgramsConfig = ProgramsConfig()
    transport: TransportConfig = TransportConfig()

    @model_validator(mode="after")
    def _default_tier_exists(self) -> Self:
        if self.default_tier not in self.tiers:
            raise ValueError(
                f"default_tier {self.default_tier!r} is not a tier; tiers are {', '.join(sorted(self.tiers))}"
            )
        return self

    @property
    def planned_scheduling(self) -> SchedulingConfig | None:
        """What engines plan their steps by; None where these are left to them."""
        chosen = self.engine.step_planner
        is_on = chosen == "on" or (chosen == "auto" and self.scheduling.policy == "tempo")
        return self.scheduling if is_on else None

    @property
    def model_name(self) -> str:
        """The name under which clients ask for the model."""
        return self.served_model_name or self.model
