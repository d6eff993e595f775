"""Runs of the goodput benchmark, interrupted ones included; seconds of simulated traffic."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import crew, goodput, goodput_plan, goodput_run
from benchmarks.goodput_report import Results, report_markdown
from benchmarks.goodput_tuning import chosen, tried
from tempo_router.errors import ConfigError
from tempo_router.request import Deadline, Latency
from tempo_router.simulation.experiment import identity, knowledge_of
from tempo_router.simulation.generate import GeneratorConfig, generate
from tempo_router.simulation.rows import COLUMNS
from tempo_router.simulation.trace import Trace, TraceCall, Unit
from tempo_router.simulation.trace_file import write_trace
from tests.goodput_rows import goodput_row

PROFILE = "llama-3-8b:h100-80g:1"


# ---- runs


@pytest.fixture(scope="module")
def trace_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("traces") / "tiny.csv.gz"
    write_trace(generate(GeneratorConfig(duration_s=12.0, rate_per_s=2.0), seed=3), path)
    return path


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def options(trace_path, out, *more):
    return goodput._parse(
        ["--traces", str(trace_path), "--loads", "1.0,1.5", "--policies", "fcfs,edf", "--objectives", "token",
         "--seeds", "1", "--out", str(out), *more]
    )  # fmt: skip


def run(parsed, say=lambda _: None, results=None):
    plan = goodput_plan.plan_of(parsed)
    results = results or Results(parsed.out, plan.conditions)
    with ThreadPoolExecutor(1) as pool:
        is_complete = goodput_run.execute(plan, results, pool, 1, say)
    return is_complete, results


def test_a_run_writes_complete_rows_with_all_documented_columns(trace_path, tmp_path):
    is_complete, results = run(options(trace_path, tmp_path / "r.json"))
    assert is_complete
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["complete"] is True
    assert [(row["load"], row["policy"]) for row in content["rows"]] == [
        (1.0, "fcfs"), (1.0, "edf"), (1.5, "fcfs"), (1.5, "edf"),
    ]  # fmt: skip
    for row in content["rows"]:
        assert set(row) == {column.name for column in COLUMNS}
        assert row["offered_tokens_per_s"] == pytest.approx(row["load"] * row["saturated_tokens_per_s"])
        assert row["wall_s"] > 0
    assert results.rows == content["rows"]


class Interrupt:
    """Presses Ctrl-C when the first row is there."""

    def __call__(self, text):
        if text.startswith("cells"):
            raise KeyboardInterrupt


def test_an_interrupted_run_keeps_its_rows_and_is_marked_incomplete_and_can_be_resumed(trace_path, tmp_path):
    out = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        run(options(trace_path, out), Interrupt())
    kept = json.loads(out.read_text())
    assert kept["complete"] is False
    assert len(kept["rows"]) == 1

    parsed = options(trace_path, out, "--resume")
    said = []
    is_complete, results = run(parsed, said.append, goodput_run.resumed(out, goodput_plan.plan_of(parsed)))
    assert is_complete
    assert said[0] == "1 of 4 cells are there already"
    assert results.rows[0] == kept["rows"][0]
    _, fresh = run(options(trace_path, tmp_path / "fresh.json"))
    assert [without_wall(row) for row in results.rows] == [without_wall(row) for row in fresh.rows]


def without_wall(row):
    return {name: value for name, value in row.items() if name != "wall_s"}


def test_rows_without_a_bound_get_it_when_the_run_is_resumed_with_it(trace_path, tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    _, before = run(options(trace_path, out))
    assert {row["bound_token_goodput"] for row in before.rows} == {None}
    bare = [dict(row) for row in before.rows]

    parsed = options(trace_path, out, "--resume", "--bound")
    is_complete, results = run(parsed, results=goodput_run.resumed(out, goodput_plan.plan_of(parsed)))
    assert is_complete
    assert json.loads(out.read_text())["rows"] == results.rows
    assert [{**row, "bound_token_goodput": None} for row in results.rows] == bare
    _, fresh = run(options(trace_path, tmp_path / "fresh.json", "--bound"))
    bounds = [row["bound_token_goodput"] for row in results.rows]
    assert bounds == [row["bound_token_goodput"] for row in fresh.rows]
    assert all(0 < row["token_goodput"] <= row["bound_token_goodput"] for row in results.rows)

    # Solved once: those of the second run came from the cache, and what is there is not looked for again.
    monkeypatch.setattr(goodput_run, "bound_tokens_per_s", None)
    assert run(parsed, results=goodput_run.resumed(out, goodput_plan.plan_of(parsed)))[0]


def test_a_bound_is_added_to_rows_of_other_code_and_of_what_the_options_name_alone(trace_path, tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    _, before = run(options(trace_path, out))
    Results(out, {**before.conditions, "code": "0" * 16}, before.rows).write(is_complete=False)
    monkeypatch.setattr(goodput, "process_pool", ThreadPoolExecutor)
    monkeypatch.setattr(goodput, "write_report", lambda *_: None)
    arguments = ["--add-bound", "--traces", str(trace_path), "--loads", "1.5", "--seeds", "1", "--out", str(out)]
    assert goodput.main(arguments) == 0
    content = json.loads(out.read_text())
    assert (content["complete"], content["conditions"]["code"]) == (False, "0" * 16)
    assert [(row["load"], row["bound_token_goodput"] is not None) for row in content["rows"]] == [
        (1.0, False), (1.0, False), (1.5, True), (1.5, True),
    ]  # fmt: skip


def test_rows_of_other_code_are_not_resumed(trace_path, tmp_path):
    out = tmp_path / "r.json"
    plan = goodput_plan.plan_of(options(trace_path, out))
    Results(out, {**plan.conditions, "code": "0" * 16}).write(is_complete=False)
    with pytest.raises(ConfigError, match="measured with other code"):
        goodput_run.resumed(out, plan)


def test_rows_of_a_trace_that_was_changed_since_are_not_resumed(trace_path, tmp_path):
    out = tmp_path / "r.json"
    plan = goodput_plan.plan_of(options(trace_path, out))
    row = goodput_row(**{**identity(plan.cells[0]), "trace_digest": "0" * 16})
    Results(out, plan.conditions, [row]).write(is_complete=False)
    with pytest.raises(ConfigError, match="two different traces are called 'tiny'"):
        goodput_run.resumed(out, plan)


def test_a_failing_cell_is_reported_and_does_not_stop_the_others(trace_path, tmp_path):
    """The KV memory holds no prompt of the second trace: no reference can be measured for it."""
    units = tuple(
        Unit(f"u{i}", float(i), Latency(2.0, 0.1), (TraceCall(f"u{i}", prompt_tokens=10**6, output_tokens=5),))
        for i in range(2)
    )
    write_trace(Trace("huge", units), tmp_path / "huge.csv")
    said = []
    parsed = options(trace_path, tmp_path / "r.json", "--traces", str(tmp_path / "huge.csv"), str(trace_path))
    is_complete, results = run(parsed, said.append)
    assert not is_complete
    assert [row["trace"] for row in results.rows] == ["tiny"] * 4
    assert [failure["trace"] for failure in results.failures] == ["huge"] * 4
    assert "KV memory" in results.failures[0]["error"]
    assert any(line.startswith("failed: fcfs on huge at 1x") for line in said)
    assert json.loads((tmp_path / "r.json").read_text())["complete"] is False


def test_seeds_permute_and_objectives_multiply_only_the_policies_that_know_them(trace_path, tmp_path):
    parsed = options(trace_path, tmp_path / "r.json", "--policies", "tempo,fcfs", "--objectives", "token,balanced",
                     "--seeds", "2", "--ablation")  # fmt: skip
    cells = goodput_plan.plan_of(parsed).cells
    of_seed = [cell for cell in cells if cell.seed == 1 and cell.load == 1.5]
    known = {id(cell): knowledge_of(cell) for cell in of_seed}
    plain = [(cell.policy, cell.objective) for cell in of_seed if not cell.switches and known[id(cell)] == "learned"]
    assert plain == [("tempo", "token"), ("tempo", "balanced"), ("fcfs", "token")]
    changed = [cell for cell in of_seed if cell.switches or known[id(cell)] != "learned"]
    assert all(cell.policy == "tempo" for cell in changed)
    assert {(known[id(cell)], *cell.switches) for cell in changed if cell.objective == "token"} >= {
        ("none",), ("true",), ("learned", "reserve"), ("learned", "timeline"),
    }  # fmt: skip


def test_chunks_of_another_size_are_those_of_all_policies_but_ours(trace_path, tmp_path):
    parsed = options(trace_path, tmp_path / "r.json", "--policies", "tempo,edf,vtc", "--chunk-tokens", "256",
                     "--loads", "1.5", "--ablation")  # fmt: skip
    cells = goodput_plan.plan_of(parsed).cells
    found = {(cell.policy, cell.switches.get("chunk_tokens")) for cell in cells}
    assert found == {("tempo", None), ("edf", 256), ("vtc", 256)}


def test_an_oracle_is_planned_and_tuned_with_true_lengths_and_nobody_else_is(trace_path, tmp_path):
    plan = goodput_plan.plan_of(
        options(trace_path, tmp_path / "r.json", "--policies", "all", "--tune", "--loads", "1.5")
    )
    cells = [*plan.cells, *(cell for tuning in plan.tunings for cell in tuning.candidates)]
    assert {cell.policy for cell in cells if identity(cell)["knowledge"] == "true"} == {"srpt"}
    assert {identity(cell)["knowledge"] for cell in cells if cell.policy == "srpt"} == {"true"}


def test_tuned_rivals_run_with_their_best_setting_and_ours_with_the_default(trace_path, tmp_path):
    parsed = options(trace_path, tmp_path / "r.json", "--policies", "tempo,edf,fcfs", "--tune",
                     "--tune-slots", "2,128")  # fmt: skip
    said = []
    is_complete, results = run(parsed, said.append)
    assert is_complete
    assert any(line.startswith("settings [") and "8/8" in line for line in said)
    choices = {choice["policy"]: choice for choice in results.choices}
    assert sorted(choices) == ["edf", "fcfs"]
    for choice in choices.values():
        assert (choice["tuning_seed"], choice["tuning_load"]) == (goodput.TUNE_SEED, 1.5)
        tried = {(one["slots"], one["sheds"]): one["token_goodput"] for one in choice["tried"]}
        assert set(tried) == {(2, True), (2, False), (128, True), (128, False)}
        assert tried[choice["slots"], choice["sheds"]] == max(tried.values())
        # Two slots are no engine: the choice is not one of nothing.
        assert tried[2, True] < tried[128, True]
    offered = {row["load"]: row["offered_tokens_per_s"] for row in results.rows}
    for row in results.rows:
        expected = choices.get(row["policy"], {"slots": 128, "sheds": True})
        assert (row["slots"], row["sheds"]) == (expected["slots"], expected["sheds"])
        assert row["tuned"] == (row["policy"] != "tempo")
        assert row["offered_tokens_per_s"] == offered[row["load"]]
    text = report_markdown([results], {}, 1.5)
    assert "## Settings of the policies" in text
    assert "rivals with the best of 2/128 slots, dropping or keeping hopeless work (seed 1000 at 1.5x)" in text


def test_choices_are_kept_for_a_resumed_run_and_can_be_taken_from_another_one(trace_path, tmp_path):
    path = tmp_path / "first.json"
    first = options(trace_path, path, "--tune", "--tune-slots", "2,128")
    run(first)
    content = json.loads(path.read_text())
    for choice in content["choices"]:
        choice["slots"] = 2
    path.write_text(json.dumps(content))

    plan = goodput_plan.plan_of(first)
    _, again = run(first, results=goodput_run.resumed(path, plan))
    assert {choice["slots"] for choice in again.choices} == {2}
    # Other settings than those of the rows that are there: new rows.
    assert sorted(row["slots"] for row in again.rows) == [2, 2, 2, 2, 128, 128, 128, 128]

    other = options(trace_path, tmp_path / "other.json", "--policies", "fcfs,vtc", "--tune-from", str(path),
                    "--tune-slots", "128")  # fmt: skip
    assert other.tune
    plan = goodput_plan.plan_of(other)
    taken = goodput_run.choices_from(path, plan, [])
    assert [choice["policy"] for choice in taken] == ["fcfs"]
    _, results = run(other, results=Results(other.out, plan.conditions, choices=taken))
    assert {row["policy"]: row["slots"] for row in results.rows} == {"fcfs": 2, "vtc": 128}


def test_all_cells_of_a_policy_on_an_engine_share_what_is_tried_for_it(trace_path, tmp_path):
    """Loads, seeds and ablations do; engines and objectives do not."""
    parsed = options(trace_path, tmp_path / "r.json", "--policies", "tempo,edf", "--objectives", "token,balanced",
                     "--seeds", "2", "--ablation", "--tune-also", "tempo", "--tune-window-s", "6",
                     "--tune-slots", "8,64", "--profile", PROFILE, "--profile", "llama-3-8b:a100-80g:1")  # fmt: skip
    plan = goodput_plan.plan_of(parsed)
    assert [(t.columns["profile"][11:15], t.columns["policy"], t.columns["objective"]) for t in plan.tunings] == [
        (engine, policy, objective)
        for engine in ("h100", "a100")
        for policy, objective in (("tempo", "token"), ("tempo", "balanced"), ("edf", "token"))
    ]
    for tuning in plan.tunings:
        assert [(cell.slots, cell.sheds) for cell in tuning.candidates] == [
            (8, True), (64, True), (8, False), (64, False),
        ]  # fmt: skip
        for cell in tuning.candidates:
            assert (cell.seed, cell.load, knowledge_of(cell), dict(cell.switches)) == (1000, 1.5, "learned", {})
            assert cell.trace.span_s < 6


def test_of_equal_settings_the_default_is_chosen_and_failed_ones_are_left_out(trace_path, tmp_path):
    plan = goodput_plan.plan_of(options(trace_path, tmp_path / "r.json", "--tune"))
    tuning = plan.tunings[0]
    equal = {(cell.slots, cell.sheds): 5.0 for cell in tuning.candidates}
    assert len(equal) == 8
    default = chosen(tuning, equal, "c")
    assert (default["slots"], default["sheds"]) == (128, True)
    few = chosen(tuning, {(48, False): 4.0, (32, True): 3.0}, "c")
    assert (few["slots"], few["sheds"], len(few["tried"])) == (48, False, 2)
    assert chosen(tuning, {}, "c") is None


def test_a_tried_setting_is_remembered_for_the_same_code_only(trace_path, tmp_path, monkeypatch):
    cell = goodput_plan.plan_of(options(trace_path, tmp_path / "r.json", "--tune")).tunings[0].candidates[0]
    found = tried(cell, "one")
    monkeypatch.setattr("benchmarks.goodput_tuning.run_cell", lambda _: {"token_goodput": -1.0})
    assert tried(cell, "one") == found
    assert found["token_goodput"] > 0
    assert tried(cell, "other")["token_goodput"] == -1.0


def test_targets_can_be_multiples_of_what_units_take_alone_on_each_engine(trace_path, tmp_path):
    a100 = "llama-3-8b:a100-80g:1"

    def deadlines(*more):
        parsed = options(trace_path, tmp_path / "r.json", "--loads", "1.5", "--policies", "fcfs", *more)
        return {
            (cell.profile_names[0], cell.trace.name): [
                unit.slo.ttlt_s
                for unit in cell.trace.units
                if isinstance(unit.slo, Deadline) and not any(call.gap_s for call in unit.calls)
            ]
            for cell in goodput_plan.plan_of(parsed).cells
        }

    found = deadlines("--slo-unloaded", "2,4", "--profile", PROFILE, "--profile", a100)
    assert len(found) == 4
    twice = found[PROFILE, "tiny 2x unloaded"]
    assert len(twice) > 3
    assert found[PROFILE, "tiny 4x unloaded"] == pytest.approx([2 * seconds for seconds in twice])
    slower = found[a100, "tiny 2x unloaded"]
    assert all(slow > 1.2 * fast for slow, fast in zip(slower, twice, strict=True))
    stretched = deadlines("--slo-unloaded", "2", "--time-scale", "3", "--profile", PROFILE)
    assert stretched[PROFILE, "tiny 2x unloaded"] == pytest.approx([3 * seconds for seconds in twice])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (("--slo-scale", "0.5"), "tiny targets x 0.5"),
        (("--prefix-cache", "off"), "tiny no prefix cache"),
        (("--window-s", "6"), "tiny first 6 s"),
        ((), "tiny"),
    ],
)
def test_a_changed_trace_has_another_name_so_that_its_rows_are_told_apart(trace_path, tmp_path, change, name):
    parsed = options(trace_path, tmp_path / "r.json", "--loads", "1.5", "--policies", "fcfs", *change)
    assert {cell.trace.name for cell in goodput_plan.plan_of(parsed).cells} == {name}


class Recorder(ThreadPoolExecutor):
    """Notes in which order cells are run."""

    def __init__(self):
        super().__init__(1)
        self.ran = []

    def submit(self, task, cell, *rest):
        if task is goodput_run._run:
            self.ran.append((cell.seed, cell.policy))
        return super().submit(task, cell, *rest)


def test_the_longest_cells_of_each_seed_come_first(trace_path, tmp_path):
    parsed = options(trace_path, tmp_path / "r.json", "--policies", "fcfs,tempo", "--loads", "1.5", "--seeds", "2")
    plan = goodput_plan.plan_of(parsed)
    with Recorder() as pool:
        assert goodput_run.execute(plan, Results(parsed.out, plan.conditions), pool, 1, lambda _: None)
    assert pool.ran == [(0, "tempo"), (0, "fcfs"), (1, "tempo"), (1, "fcfs")]


def test_how_long_cells_take_is_foretold_from_rows_of_their_policies(trace_path, tmp_path):
    cells = goodput_plan.plan_of(
        options(trace_path, tmp_path / "r.json", "--policies", "fcfs,edf,tempo", "--loads", "1.5")
    ).cells
    rows = [goodput_row("edf", wall_s=60.0), goodput_row("edf", seed=1, wall_s=80.0), goodput_row("fcfs", wall_s=10.0),
            goodput_row("vtc", wall_s=None)]  # fmt: skip
    speeds = goodput_run.speeds_of(rows)
    assert speeds == {"edf": pytest.approx(70 / 4500), "fcfs": pytest.approx(10 / 4500)}
    calls = cells[0].trace.calls
    found = {cell.policy: goodput_run.work_of(cell, speeds) / calls for cell in cells}
    # No row of ours: its guessed slowness, times what is usual.
    assert found == {
        "edf": pytest.approx(70 / 4500),
        "fcfs": pytest.approx(10 / 4500),
        "tempo": pytest.approx(goodput_run.SLOWNESS["tempo"] * 40 / 4500),
    }


def test_what_is_left_is_foretold_by_weight_and_not_by_number(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(crew.time, "monotonic", lambda: now[0])
    said = []
    bar = crew.Bar("cells", 3, said.append, total_weight=10.0)
    now[0] = 180.0
    bar.step("the longest", 8.0)
    assert said == ["cells [########................] 1/3, 1 min 20 s, about 20 s left"]


def test_a_search_for_replicas_says_what_it_tried(trace_path, tmp_path):
    parsed = options(trace_path, tmp_path / "r.json", "--policies", "edf", "--loads", "1.0", "--replicas-needed",
                     "--rates", "2.0")  # fmt: skip
    _, results = run(parsed)
    (need,) = results.needs
    assert need["replicas"] is not None
    assert need["attainment"] >= 0.95
    assert all(share < 0.95 for count, share in need["tried"].items() if int(count) < need["replicas"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "edff"], "policy='edff': no such policy; did you mean 'edf'?"),
        (["--objectives", "tokens"], "objective='tokens': no such objective; did you mean 'token'?"),
        (["--traces", "nowhere.csv"], "nowhere.csv"),
        (["--profile", "llama-3-8b:h100"], "no such step-time profile"),
        (["--render", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--tune-from", "nowhere.json"], "nowhere.json: cannot be read"),
        (["--tune-also", "tempp"], "policy='tempp': no such policy; did you mean 'tempo'?"),
    ],
)
def test_what_is_unknown_is_said_before_anything_runs(arguments, message, trace_path, tmp_path, capsys):
    status = goodput.main(["--traces", str(trace_path), "--out", str(tmp_path / "r.json"), *arguments])
    assert status == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()


def test_results_do_not_overwrite_a_trace(trace_path, capsys):
    before = trace_path.read_bytes()
    assert goodput.main(["--traces", str(trace_path), "--out", str(trace_path)]) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert trace_path.read_bytes() == before


@pytest.mark.parametrize(
    "arguments", [["--loads", "1.0,0"], ["--loads", "nan"], ["--seeds", "0"], ["--kv-scale", "-1"]]
)
def test_numbers_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as refusal:
        goodput.main(arguments)
    assert refusal.value.code == 2
    assert "above zero" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tune", "--tune-seed", "2"], "--tune-seed 2 is among the 3 seeds that are compared"),
        (["--slo-unloaded", "2", "--slo-scale", "0.5"], "leave --slo-scale out"),
        (["--tune", "--chunk-tokens", "256"], "leave one out"),
        (["--tune-slots", "32,0"], "'0': must be a whole number above zero"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments, message, trace_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        goodput.main(["--traces", str(trace_path), *arguments])
    assert refusal.value.code == 2
    assert message in capsys.readouterr().err


def test_two_traces_of_one_name_are_refused(trace_path, tmp_path, capsys):
    copy = tmp_path / trace_path.name
    copy.write_bytes(trace_path.read_bytes())
    assert goodput.main(["--traces", str(trace_path), str(copy), "--out", str(tmp_path / "r.json")]) == 2
    assert "rename a file" in capsys.readouterr().err


def test_ctrl_c_ends_a_real_run_at_once_with_its_rows_on_disk(trace_path, tmp_path):
    out = tmp_path / "r.json"
    arguments = ["--traces", str(trace_path), "--loads", ",".join(str(1 + i / 100) for i in range(100)), "--policies",
                 "fcfs,edf", "--seeds", "30", "--jobs", "1", "--out", str(out)]  # fmt: skip
    program = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.goodput", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(goodput.__file__).parents[1],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A shell starts what it runs in the background with Ctrl-C ignored, tests included.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  # no threads here
    )
    assert program.stderr is not None
    with program.stderr:
        for line in program.stderr:
            if line.startswith("cells"):
                break
        program.send_signal(signal.SIGINT)
        rest = program.stderr.read()
    assert program.wait() == 130, rest
    kept = json.loads(out.read_text())
    assert kept["complete"] is False
    assert 1 <= len(kept["rows"]) < 6000
    assert "--resume" in rest
