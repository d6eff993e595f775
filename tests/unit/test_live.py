"""The live replay's rows, its summary, and the report that is made of them."""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import goodput, live
from benchmarks.goodput_report import Results, read_results, report_markdown
from benchmarks.live_client import Target
from benchmarks.servers import Server, _flag
from tempo_router.request import BestEffort, Deadline
from tempo_router.simulation.experiment import recorded_tokens_per_s
from tempo_router.simulation.generate import GeneratorConfig, generate
from tempo_router.simulation.report import Report
from tempo_router.simulation.rows import COLUMNS
from tempo_router.simulation.simulator import Setup, simulate
from tempo_router.simulation.step_profiles import load_profile
from tempo_router.simulation.trace import Trace, TraceCall, Unit
from tests.unit.test_live_truth import log_of

TRACE = generate(GeneratorConfig(duration_s=60.0), seed=0)
A100 = load_profile("llama-3-8b:a100-80g:1")


def options(*arguments: str) -> argparse.Namespace:
    return live.parsed(arguments)


def rows_of(chosen: argparse.Namespace, policies: Sequence[str]) -> list[dict[str, Any]]:
    """Rows as `run` makes them, of reports that a simulation made."""
    found = []
    for load in chosen.loads:
        part = live.offered(TRACE, load, recorded_tokens_per_s(TRACE), 30.0, 0)
        for policy in policies:
            router = live.POLICIES.get(policy, {"policy": "fcfs"})["policy"]
            report = simulate(part, Setup(router, (A100,), max_running=16))
            identity = live.identity_of(chosen, TRACE, policy, load=load, seed=0, saturated_tokens_per_s=900.0)
            found.append(live.row(report, part, **identity))
    return found


# ---- rows and report


def test_a_row_has_the_columns_of_the_simulators_and_nothing_that_a_client_cannot_see():
    (row,) = rows_of(options("--loads", "1.5", "--policies", "tempo"), ["tempo"])
    assert list(row) == [column.name for column in COLUMNS]
    assert (row["time_scale"], row["kv_scale"], row["switches"]) == (1.0, 1.0, {})
    assert [row[name] for name in ("steps", "preemptions", "recomputed_tokens", "prefix_hit_tokens")] == [None] * 4
    assert row["token_goodput"] > 0


def test_the_results_render_into_the_tables_and_pictures_of_the_simulators(tmp_path: Path):
    policies = ["vllm", "fcfs", "class_priority", "tempo"]
    chosen = options("--loads", "0.75,1.5", "--policies", ",".join(policies), "--workers", "2")
    results = Results(tmp_path / "live.json", live.conditions_of(chosen, TRACE), rows_of(chosen, policies))
    results.further["summary"] = live.summary(results.rows)
    results.write(is_complete=True)

    report = tmp_path / "report.md"
    assert goodput.main(["--render", str(results.path), "--report", str(report)]) == 0
    text = report.read_text()
    assert "- Live, " in text
    assert "live tempo-tiny x 2 through http" in text
    assert "**tempo (balanced) no shedding 8 slots**" in text
    assert "vllm no shedding 8 slots" in text
    assert "| 1.5x | balanced |" in text, "ours is compared"
    assert not [mark for mark in (" ✓ |", " ✗ |", "## Aims") if mark in text], "aims are those of simulated traffic"
    pictures = sorted(path.name for path in (tmp_path / "report").glob("*.png"))
    assert [name.rpartition("-")[2] for name in pictures] == ["classes.png", "distributions.png", "load.png"]
    assert all(f"](report/{name})" in text for name in pictures)
    assert json.loads(results.path.read_text())["summary"] == results.further["summary"]


def test_live_and_simulated_results_share_a_report():
    chosen = options("--loads", "1.5", "--policies", "fcfs,tempo")
    ours = Results(Path("live.json"), live.conditions_of(chosen, TRACE), rows_of(chosen, ["fcfs", "tempo"]))
    simulated = Results(
        Path("simulated.json"),
        {name: value for name, value in ours.conditions.items() if name != "live"} | {"profiles": ["a100"]},
        [row | {"profile": "a100"} for row in ours.rows],
    )
    text = report_markdown([ours, simulated], {}, 1.5)
    assert "- Live, " in text
    assert "- Simulated, " in text
    assert "**a100, " in text


# ---- summary


def row(policy: str, seed: int, goodput: float, streams: float | None = None, load: float = 1.5) -> dict[str, Any]:
    by_class = {} if streams is None else {"latency": streams}
    return {
        "load": load, "policy": policy, "seed": seed, "token_goodput": goodput, "request_goodput": 1.0,
        "attainment": 0.5, "ttft_p95_s": None if streams is None else 0.2, "throughput": 10.0,
        "attainment_by_class": by_class,
    }  # fmt: skip


def test_ratios_are_taken_seed_by_seed_with_their_spread():
    rows = [
        row("fcfs", 0, 100),
        row("fcfs", 1, 50),
        row("vllm", 0, 80),
        row("tempo", 0, 200, 1.0),
        row("tempo", 1, 200, 0.9),
    ]
    fcfs, vllm, tempo = live.summary(rows)
    assert [one["policy"] for one in (fcfs, vllm, tempo)] == ["fcfs", "vllm", "tempo"]
    assert tempo["token_goodput"] == {"mean": 200, "min": 200, "max": 200}
    assert tempo["goodput_over_fcfs"] == {"mean": 3.0, "min": 2.0, "max": 4.0}
    assert tempo["goodput_over_vllm"] == {"mean": 2.5, "min": 2.5, "max": 2.5}, "of the one seed that both have"
    assert tempo["goodput_over_class_priority"] is None
    assert tempo["attainment_of_streams"] == {"mean": 0.95, "min": 0.9, "max": 1.0}
    assert (fcfs["attainment_of_streams"], fcfs["ttft_p95_s"]) == (None, None)
    assert (tempo["seeds"], vllm["seeds"]) == (2, 1)


def test_loads_are_apart_and_a_rival_without_goodput_has_no_ratio():
    rows = [
        row("fcfs", 0, 0.0),
        row("tempo", 0, 5.0),
        row("fcfs", 0, 10.0, load=0.75),
        row("tempo", 0, 10.0, load=0.75),
    ]
    found = {(one["load"], one["policy"]): one["goodput_over_fcfs"] for one in live.summary(rows)}
    assert list(found) == [(0.75, "fcfs"), (0.75, "tempo"), (1.5, "fcfs"), (1.5, "tempo")]
    assert found[0.75, "tempo"] == {"mean": 1.0, "min": 1.0, "max": 1.0}
    assert found[1.5, "tempo"] is None


# ---- what is run


class Served:
    """An application that simulates what is replayed on it. replayed: in order."""

    def __init__(self, slots: int = 16) -> None:
        self.replayed: list[Trace] = []
        self._setup = Setup("fcfs", (A100,), max_running=slots)

    def __call__(self, trace: Trace, _limit_s: float) -> Report:
        self.replayed.append(trace)
        # The simulator has no programs without a deadline.
        units = (
            replace(unit, slo=Deadline(1e8)) if unit.is_program and not isinstance(unit.slo, Deadline) else unit
            for unit in trace.units
        )
        return simulate(Trace(trace.name, tuple(units)), self._setup)


def test_load_one_is_measured_without_any_target():
    """A service refuses a deadline in years, which is what the simulator's reference gives programs."""
    served = Served()
    assert live.saturated_tokens_per_s(TRACE, served, 3000) > 0
    assert {unit.slo for trace in served.replayed for unit in trace.units} == {BestEffort()}


def test_policies_take_turns_over_the_same_arrivals_and_rows_are_kept(tmp_path: Path, monkeypatch):
    applications = {"vllm": Served(), "fcfs": Served()}
    monkeypatch.setattr(live, "_start", lambda *_: applications)
    monkeypatch.setattr(live, "workload", lambda _: TRACE)
    path = tmp_path / "out.json"
    chosen = options(
        "--policies", "vllm,fcfs", "--loads", "0.5,1.5", "--seeds", "2", "--seconds", "5", "--backlog", "1000",
        "--folder", str(tmp_path), "--json", str(path),
    )  # fmt: skip
    results = live.run(chosen)

    assert [(row["seed"], row["load"], row["policy"]) for row in results.rows] == [
        (0, 0.5, "vllm"), (0, 0.5, "fcfs"), (0, 1.5, "vllm"), (0, 1.5, "fcfs"),
        (1, 0.5, "fcfs"), (1, 0.5, "vllm"), (1, 1.5, "fcfs"), (1, 1.5, "vllm"),
    ]  # fmt: skip
    assert applications["vllm"].replayed[-4:] == applications["fcfs"].replayed[-4:]
    written = json.loads(path.read_text())
    assert (written["complete"], len(written["rows"]), len(written["summary"])) == (True, 8, 4)
    assert read_results(path).rows == json.loads(json.dumps(results.rows))


def test_of_stock_vllm_there_are_as_many_servers_as_workers_otherwise(tmp_path: Path, monkeypatch):
    started = []

    @contextmanager
    def noting(folder: Path, model_path: str, engine_kwargs: dict[str, Any], *, model: str) -> Iterator[Server]:
        started.append((folder.relative_to(tmp_path), model_path, engine_kwargs["scheduling_policy"], model))
        yield Server("plain", f"http://server-{len(started)}", 0)

    monkeypatch.setattr(live, "plain_vllm", noting)
    monkeypatch.setattr(live, "resolve_model", lambda name, _: f"path of {name}")
    with ExitStack() as stack:
        chosen = options("--workers", "2")
        plain, priority = (live._start_stock(stack, tmp_path, policy, chosen) for policy in ("vllm", "vllm_priority"))
    assert plain == Target(("http://server-1", "http://server-2"), "tempo-tiny", has_programs=False)
    assert (priority.urls, priority.has_priorities) == (("http://server-3", "http://server-4"), True)
    assert started[1] == (Path("server-1"), "path of tempo-tiny", "fcfs", "tempo-tiny")
    assert started[2] == (Path("server-0"), "path of tempo-tiny", "priority", "tempo-tiny")


@pytest.mark.parametrize(("policy", "scheduling"), [("vllm", "fcfs"), ("vllm_priority", "priority")])
def test_stock_vllm_has_the_engine_arguments_of_all_and_its_own_policy(
    policy: str, scheduling: str, tmp_path: Path, monkeypatch
):
    started = []

    @contextmanager
    def noting(_folder: Path, _path: str, engine_kwargs: dict[str, Any], *, model: str) -> Iterator[Server]:
        started.append(engine_kwargs)
        yield Server("plain", f"http://{model}", 0)

    monkeypatch.setattr(live, "plain_vllm", noting)
    monkeypatch.setattr(live, "resolve_model", lambda name, _: name)
    chosen = options("--slots", "4", "--engine-kwargs", '{"seed": 7}')
    with ExitStack() as stack:
        live._start_stock(stack, tmp_path, policy, chosen)
    ours = live.arguments_of("tempo", chosen)["engine"]["engine_kwargs"]
    assert started == [{**ours, "scheduling_policy": scheduling}]
    assert (ours["max_num_seqs"], ours["seed"], ours["enforce_eager"]) == (4, 7, True)


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("max_num_seqs", 8, "--max-num-seqs=8"),
        ("enforce_eager", True, "--enforce-eager"),
        ("enable_prefix_caching", False, "--no-enable-prefix-caching"),
        ("hf_overrides", {"a": 1}, '--hf-overrides={"a": 1}'),
    ],
)
def test_engine_arguments_become_flags_of_vllms_command(name: str, value: object, flag: str):
    assert _flag(name, value) == flag


def test_policies_that_a_way_cannot_serve_are_refused(capsys: pytest.CaptureFixture[str]):
    assert options("--through", "fleet").policies == ["fcfs", "priority", "class_priority", "tempo"]
    assert options().policies[:2] == ["vllm", "vllm_priority"]
    with pytest.raises(SystemExit):
        options("--through", "fleet", "--policies", "vllm,tempo")
    assert "no such policies through fleet: vllm; there are fcfs, priority" in capsys.readouterr().err


def test_quick_sets_only_what_is_not_given():
    def sizes(chosen: argparse.Namespace) -> tuple[Any, ...]:
        return chosen.policies, chosen.seeds, chosen.loads, chosen.seconds

    assert sizes(options("--quick")) == (["fcfs", "tempo"], 1, [1.5], 20.0)
    given = ("--policies", "priority", "--seeds", "2", "--loads", "0.5,1", "--seconds", "60")
    assert sizes(options("--quick", *given)) == sizes(options(*given)) == (["priority"], 2, [0.5, 1.0], 60.0)
    assert sizes(options("--through", "fleet")) == (list(live.POLICIES), 3, [0.75, 1.5], 60.0)


# ---- truth


def test_a_cell_whose_record_tells_too_little_has_the_reason_and_the_others_their_truth(tmp_path: Path):
    """Steps were made while the first cell ran, and none during the second."""
    chosen = options("--policies", "fcfs", "--folder", str(tmp_path))
    log = live.events_log("fcfs", chosen)
    log.parent.mkdir(parents=True)
    log_of(log.parent, {0: 1.0})
    part = Trace("mail", (Unit("mail", 0.0, Deadline(60.0), (TraceCall("sort", 10, 40),)),))
    report = simulate(part, Setup("fcfs", (A100,), max_running=8))
    cell = {"seed": 0, "saturated_tokens_per_s": 900.0}
    rows = [live.row(report, part, **live.identity_of(chosen, part, "fcfs", load=load, **cell)) for load in (0.5, 1.5)]

    first, second = live.truth(rows, [(part, 100.0, 101.5), (part, 200.0, 201.0)], chosen)
    assert (first["load"], first["steps"]) == (0.5, [250])
    assert first["ttlt_p95_s"]["simulated"] > 0
    assert second == {
        "policy": "fcfs", "load": 1.5, "seed": 0,
        "reason": f"{log.with_name('events-1.jsonl')}: no step was made by gpu0 between 200.0 and 201.0 s",
    }  # fmt: skip
