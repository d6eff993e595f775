import csv
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tempo_router.cli import main
from tempo_router.request import BestEffort, Deadline, Latency
from tempo_router.simulation.trace_file import read_trace

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Figures that simulations keep for later ones stay in this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def trace(tmp_path):
    """A file of some 30 small requests in 60 s: a second of simulation."""
    path = tmp_path / "small.csv"
    lengths = [f"{app}.{part}={{}}" for app in ("chat", "code", "summarize") for part in ("prompt", "output")]
    small = json.dumps({"median": 20, "sigma": 0.3, "at_most": 60})
    settings = [pair.format(small) for pair in lengths]
    assert main(["generate", "--out", str(path), "duration_s=60", "rate_per_s=0.5", "program_weight=0", *settings]) == 0
    return path


@pytest.fixture
def refused(capsys):
    """Runs a command that has to end with status 2 and one line on stderr; returns that line."""

    def run(*arguments):
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as e:
            status = e.code
        out, err = capsys.readouterr()
        assert status == 2
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("tempo-router")
        return err

    return run


def test_the_command_is_installed_with_the_package():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]

    assert scripts["tempo-router"] == "tempo_router.cli:main"


@pytest.mark.parametrize("module", ["argparse", "tqdm", "tempo_router.simulation.trace_file"])
def test_ctrl_c_while_modules_are_loaded_ends_quietly(module):
    program = f"""
import sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt

sys.modules.pop({module!r}, None)
sys.meta_path.insert(0, Interrupt())
from tempo_router.cli import main
sys.exit("loaded")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])

    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(f"    {name} " in out for name in ("generate", "convert", "trace", "simulate", "bound"))


# ---- generate, convert, trace


def test_generate_writes_what_was_asked_for(tmp_path, capsys):
    path = tmp_path / "g.csv.gz"
    status = main(["generate", "--out", str(path), "--seed", "3", "duration_s=100", "slo_factor=0.5", "tenants=1"])

    trace = read_trace(path)
    assert status == 0
    assert capsys.readouterr().out == f"{path}: {len(trace.units)} units, {trace.calls} calls\n"
    assert {unit.tenant for unit in trace.units} == {"t0"}
    assert Latency(1.0, 0.05) in {unit.slo for unit in trace.units}


def test_generate_lists_settings_that_it_takes(tmp_path, capsys):
    assert main(["generate", "--list"]) == 0
    lines = [line.partition("  # ")[0] for line in capsys.readouterr().out.splitlines()]

    assert "rate_per_s=1.0" in lines
    assert "chat.prompt.median=900.0" in lines
    assert main(["generate", "--out", str(tmp_path / "all.csv"), *lines]) == 0
    assert main(["generate", "--out", str(tmp_path / "none.csv")]) == 0
    assert (tmp_path / "all.csv").read_bytes() == (tmp_path / "none.csv").read_bytes()


def test_convert_writes_a_trace_and_counts_what_it_left_out(tmp_path, capsys):
    source = tmp_path / "b.csv"
    source.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n118,GPT-4,417,0,417,API log\n",
        encoding="utf-8",
    )
    out = tmp_path / "b.csv.gz"
    status = main(["convert", str(source), "--from", "burstgpt", "--out", str(out), "--class", "best_effort"])

    assert status == 0
    assert capsys.readouterr().out == f"{out}: 1 requests, 1 without an answer left out\n"
    (unit,) = read_trace(out).units
    assert (unit.app, unit.tenant, unit.slo) == ("chat", "ChatGPT", BestEffort())


def test_convert_gives_times_to_a_file_without(tmp_path):
    source = tmp_path / "c.jsonl"
    source.write_text('{"prompt_len": 5, "output_tokens": 6}\n' * 3, encoding="utf-8")
    out = tmp_path / "c.csv"

    assert main(["convert", str(source), "--from", "vllm-bench", "--out", str(out), "--rate", "2", "--seed", "4"]) == 0
    assert len(read_trace(out).units) == 3


def test_trace_prints_what_a_file_holds(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text(
        "request_id,arrival_s,app,class,prompt_tokens,output_tokens,program_id,parents,prefix_id,prefix_tokens\n"
        "0,0,chat,latency,100,10,,,,\n1,30,chat,latency,100,10,,,,\n2,60,r,collective,100,10,p,,p,0\n"
        "3,,r,collective,200,20,p,2,p,110\n4,130,chat,best_effort,100,10,,,,\n",
        encoding="utf-8",
    )
    assert main(["trace", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["calls"] == 5
    assert found["units_by_class"] == {"latency": 2, "program": 1, "best_effort": 1}
    assert found["arrivals_per_s"] == pytest.approx(3 / 130)
    assert found["gap_cv"] == pytest.approx(0.4351, abs=1e-4)
    assert found["peak_over_mean"] == pytest.approx(2 / (4 / 3))
    assert found["prefix_share"] == pytest.approx(110 / 600)
    assert found["max_call_tokens"] == 220
    assert (found["programs"], found["stages_p50"], found["longest_program"]) == (1, 2, 2)

    assert main(["trace", str(path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("t\n")
    assert "latency 2 (50.0%), program 1 (25.0%), best_effort 1 (25.0%)" in text
    assert "0.183 of all prompt tokens" in text


def test_a_trace_of_one_request_has_no_rate(tmp_path, capsys):
    path = tmp_path / "t.csv"
    path.write_text("request_id,arrival_s,class,prompt_tokens,output_tokens\n0,0,latency,100,10\n", encoding="utf-8")

    assert main(["trace", str(path)]) == 0
    assert "arrivals        -/s, CV of gaps -" in capsys.readouterr().out


# ---- simulate and bound


def test_simulate_writes_a_row_for_every_combination(trace, tmp_path, capsys):
    out, table = tmp_path / "r.json", tmp_path / "r.csv"
    status = main(
        f"simulate --trace {trace} --profile toy-cpu --load 0.5 --load 1 --policy fcfs --policy edf --seed 0 --seed 1"
        f" --out {out} --csv {table}".split()
    )

    assert status == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["complete"] is True
    cells = [(row["load"], row["policy"], row["seed"]) for row in result["rows"]]
    assert cells == [(load, policy, seed) for load in (0.5, 1.0) for policy in ("fcfs", "edf") for seed in (0, 1)]
    for row in result["rows"]:
        assert row["trace"] == "small"
        assert row["token_goodput"] > 0
        assert row["wall_s"] > 0
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["complete"] for row in rows] == ["true"] * 8
    assert [float(row["token_goodput"]) for row in rows] == [row["token_goodput"] for row in result["rows"]]
    printed, err = capsys.readouterr()
    assert len(printed.splitlines()) == 1 + 8
    assert err == "", "no progress bar where nobody watches"


def test_what_is_given_twice_runs_once(trace, tmp_path):
    out = tmp_path / "r.json"
    twice = f"--trace {trace} --load 1 --policy fcfs --seed 0"
    other = f"--trace {trace.parent}/../{trace.parent.name}/{trace.name} --load 1.0 --policy fcfs --seed 00"
    assert main(f"simulate --profile toy-cpu {twice} {other} --out {out}".split()) == 0
    assert len(json.loads(out.read_text(encoding="utf-8"))["rows"]) == 1


def test_simulate_gives_shortest_remaining_time_true_lengths_and_others_what_is_learnt(trace, tmp_path):
    out = tmp_path / "r.json"
    base = f"simulate --trace {trace} --profile toy-cpu --policy fcfs --policy srpt --out {out}".split()
    for options, expected in (([], ["learned", "true"]), (["--knowledge", "none"], ["none", "none"])):
        assert main([*base, *options]) == 0
        rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
        assert [row["knowledge"] for row in rows] == expected


def test_rates_of_arrivals_that_are_over_at_once_are_warned_of(trace, capsys):
    base = ["simulate", "--trace", str(trace), "--profile", "toy-cpu", "--policy", "fcfs"]
    assert main([*base, "--load", "0.5", "--load", "1000000"]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "in 1 of 2 runs most of the time is after the last arrival" in said
    assert "per second of arrivals" in said

    assert main([*base, "--load", "0.5"]) == 0
    assert capsys.readouterr().err == ""


def test_clients_without_patience_leave(trace, tmp_path):
    goodput = {}
    for name, options in (("patient", []), ("impatient", ["--patience", "0.000001", "--retries", "2"])):
        out = tmp_path / f"{name}.json"
        arguments = ["simulate", "--trace", str(trace), "--profile", "toy-cpu", "--load", "1", "--out", str(out)]
        assert main([*arguments, *options]) == 0
        goodput[name] = json.loads(out.read_text(encoding="utf-8"))["rows"][0]["token_goodput"]
    assert goodput["impatient"] < 0.5 * goodput["patient"]


def test_simulate_can_generate_change_and_replicate(tmp_path, capsys):
    out = tmp_path / "r.json"
    status = main(
        "simulate --generate duration_s=40 program_weight=0 chat.output.at_most=50 --profile toy-cpu --replicas 2"
        " --policy fcfs --without-app summarize --max-call-tokens 2000 --slo-unloaded 3 --slots 8"
        f" --out {out}".split()
    )

    assert status == 0, capsys.readouterr().err
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert (row["replicas"], row["slots"], row["load"]) == (2, 8, 1.0)


@pytest.mark.parametrize("arrivals_s", [(0,), (0, 0, 0), (0, 5, 20)])
def test_a_trace_can_be_simulated_at_its_own_speed(tmp_path, capsys, arrivals_s):
    path, out = tmp_path / "t.csv", tmp_path / "r.json"
    rows = "".join(f"{number},{at},throughput,50,20\n" for number, at in enumerate(arrivals_s))
    path.write_text(f"request_id,arrival_s,class,prompt_tokens,output_tokens\n{rows}", encoding="utf-8")

    status = main(f"simulate --trace {path} --profile toy-cpu --load recorded --policy fcfs --out {out}".split())

    assert status == 0
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert (row["load"], row["saturated_tokens_per_s"]) == (None, None)
    assert row["arrival_span_s"] == arrivals_s[-1]
    window_s = row["arrival_span_s"] or row["duration_s"]
    assert row["token_goodput"] == pytest.approx(20 * len(arrivals_s) / window_s)
    assert "recorded  fcfs" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_is_done_and_says_so(trace, tmp_path, capsys, monkeypatch):
    from tempo_router.simulation import experiment

    run_cell = experiment.run_cell
    ran = []

    def run_two(cell, *arguments, **more):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(cell)
        return run_cell(cell, *arguments, **more)

    monkeypatch.setattr(experiment, "run_cell", run_two)
    out, table = tmp_path / "r.json", tmp_path / "r.csv"
    seeds = " ".join(f"--seed {seed}" for seed in range(5))
    status = main(f"simulate --trace {trace} --profile toy-cpu --policy fcfs {seeds} --out {out} --csv {table}".split())

    assert status == 130
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["complete"] is False
    assert [row["seed"] for row in result["rows"]] == [0, 1]
    with table.open(encoding="utf-8", newline="") as file:
        assert [row["complete"] for row in csv.DictReader(file)] == ["false", "false"]
    out_text, err_text = capsys.readouterr()
    assert "interrupted; 2 of 5 runs are complete" in err_text
    assert out_text.splitlines()[-1] == "incomplete: 2 of 5 runs"


def test_a_run_that_is_interrupted_before_its_first_row_is_marked_in_both_files(trace, tmp_path, monkeypatch):
    from tempo_router.simulation import experiment

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run_cell", interrupted)
    out, table = tmp_path / "r.json", tmp_path / "r.csv"
    assert main(f"simulate --trace {trace} --profile toy-cpu --out {out} --csv {table}".split()) == 130

    assert json.loads(out.read_text(encoding="utf-8"))["complete"] is False
    with table.open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row.pop("complete") == "false"
    assert set(row.values()) == {""}


@pytest.mark.filterwarnings("default")
def test_a_cache_that_cannot_be_written_costs_no_run(trace, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    out = tmp_path / "r.json"
    assert main(f"simulate --trace {trace} --profile toy-cpu --load 0.5 --policy fcfs --out {out}".split()) == 0

    assert json.loads(out.read_text(encoding="utf-8"))["complete"] is True
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tempo-router: cannot keep figures in /dev/null/tempo/figures (Not a directory)")


def test_an_interrupted_bound_keeps_what_is_done_and_says_so(trace, tmp_path, monkeypatch, capsys):
    from tempo_router.simulation import bound

    bound_of = bound.token_goodput_bound
    solved = []

    def solve_one(*arguments, **more):
        if solved:
            raise KeyboardInterrupt
        solved.append(True)
        return bound_of(*arguments, **more)

    monkeypatch.setattr(bound, "token_goodput_bound", solve_one)
    out = tmp_path / "b.json"

    assert main(f"bound --trace {trace} --trace {trace} --profile toy-cpu --out {out}".split()) == 130
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["complete"] is False
    assert [found["trace"] for found in result["bounds"]] == ["small"]
    out_text, err_text = capsys.readouterr()
    assert "interrupted; 1 of 2 bounds are complete" in err_text
    assert out_text.splitlines()[-1] == "incomplete: 1 of 2 bounds"


def test_a_full_disk_under_stdout_is_one_line(trace):
    command = [sys.executable, "-c", "import sys; from tempo_router.cli import main; sys.exit(main())", "trace", trace]
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)

    assert ended.returncode == 2
    assert ended.stderr == "tempo-router: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize(("closed", "status"), [("stdout", 2), ("stderr", 0)])
def test_a_closed_output_is_no_traceback(trace, closed, status):
    redirected = ">&-" if closed == "stdout" else "2>&-"
    program = "import sys; from tempo_router.cli import main; sys.exit(main())"
    command = ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-c", program]
    options = ["simulate", "--profile", "toy-cpu", "--policy", "fcfs", "--load", "9", "--trace", str(trace)]
    ended = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT, check=False)

    assert ended.returncode == status
    if closed == "stdout":
        assert ended.stderr == "tempo-router: the output cannot be written: standard output is closed\n"
    else:
        assert "good tok/s" in ended.stdout


def test_bound_is_no_less_than_what_a_policy_gets(trace, tmp_path, capsys):
    bound_file, rows_file = tmp_path / "b.json", tmp_path / "r.json"
    common = ["--trace", str(trace), "--profile", "toy-cpu", "--load", "1.2"]

    assert main(["bound", *common, "--out", str(bound_file)]) == 0
    assert "Assumptions:" in capsys.readouterr().out
    assert main(["simulate", *common, "--policy", "edf", "--out", str(rows_file)]) == 0
    result = json.loads(bound_file.read_text(encoding="utf-8"))
    assert result["complete"] is True
    (bound,) = result["bounds"]
    (row,) = json.loads(rows_file.read_text(encoding="utf-8"))["rows"]
    assert bound["per_s"] >= row["token_goodput"] > 0


@pytest.mark.parametrize("requests", [1, 3])
def test_the_bound_of_what_comes_at_once_has_no_rate(tmp_path, capsys, requests):
    path, out = tmp_path / "at-once.csv", tmp_path / "b.json"
    rows = "".join(f"{number},0,throughput,50,20\n" for number in range(requests))
    path.write_text(f"request_id,arrival_s,class,prompt_tokens,output_tokens\n{rows}", encoding="utf-8")

    assert main(["bound", "--trace", str(path), "--profile", "toy-cpu", "--out", str(out)]) == 0
    (bound,) = json.loads(out.read_text(encoding="utf-8"))["bounds"]
    assert bound["per_s"] is None
    assert bound["total"] == pytest.approx(20 * requests, rel=1e-3)
    printed = capsys.readouterr().out
    assert f"at-once: at most - good tokens/s ({20 * requests} in all)" in printed
    assert "all of it comes at once" in printed


# ---- what can be wrong


@pytest.mark.parametrize("load", ["0", "-1", "nan", "inf", "fast", ""])
def test_a_load_that_is_not_above_zero_is_refused(trace, refused, load):
    line = refused("simulate", "--trace", trace, "--profile", "toy-cpu", f"--load={load}")

    assert f"--load: {load!r}: must be a number above zero, or recorded" in line


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--policy", "fcfss"], "policy='fcfss': no such policy; did you mean 'fcfs'?"),
        (["--objective", "tokens"], "objective='tokens': no such objective; did you mean 'token'?"),
        (["--knowledge", "learnt"], "did you mean 'learned'?"),
        (["--switch", "tik_s=1"], "tick_s"),
        (["--switch", "tick_s"], "expected KEY=VALUE"),
        (["--switch", "timeline=maybe"], "switches: timeline='maybe': Input should be a valid boolean"),
        (["--switch", "tick_s=1", "--switch", "tick_s=2"], "tick_s: given twice"),
        (
            ["--profile", "toy-gpu", "--slots", "4"],
            "'toy-gpu': no such step-time profile among the presets; there are",
        ),
        (["--profile-path", "nowhere.json"], "nowhere.json"),
        (["--profile", "toy-cpu", "--replicas", "3"], "--replicas 3: there are 2 --profile"),
        (["--slots", "0"], "must be a whole number above zero"),
        (["--seed", "-1"], "not below zero"),
        (["--patience", "0"], "must be a number above zero"),
        (["--retries", "-1"], "not below zero"),
        (["--generate"], "give --trace or --generate, not both"),
        (["--max-call-tokens", "1"], "units is left; leave out less"),
        (["--without-app", "chatt"], "--without-app chatt: no unit is of this application; there are: chat, code"),
        (["--polciy", "edf"], "unrecognized arguments: --polciy edf"),
        (["--out", "/dev/null/r.json"], "/dev/null"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_runs(trace, refused, arguments, problem):
    assert problem in refused("simulate", "--trace", trace, "--profile", "toy-cpu", *arguments)


def test_a_bound_that_could_not_be_written_is_not_computed(trace, refused):
    line = refused("bound", "--trace", trace, "--profile", "toy-cpu", "--out", "/dev/null/b.json")

    assert "/dev/null/b.json: cannot be written" in line


def test_a_conversion_does_not_overwrite_its_source(tmp_path, refused):
    source = tmp_path / "conv.csv"
    source.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00,1,1\n", encoding="utf-8")
    before = source.read_bytes()

    assert "would be overwritten" in refused("convert", source, "--from", "azure", "--out", source)
    assert source.read_bytes() == before


@pytest.mark.parametrize("command", ["simulate", "bound"])
def test_results_do_not_overwrite_the_trace(trace, refused, command, monkeypatch):
    before = trace.read_bytes()
    monkeypatch.chdir(trace.parent)

    line = refused(command, "--trace", trace, "--profile", "toy-cpu", "--out", f"./{trace.name}")

    assert "small.csv: it is read and would be overwritten" in line
    assert trace.read_bytes() == before


def test_two_outputs_in_one_file_are_refused(trace, refused, tmp_path):
    out = tmp_path / "r"
    line = refused("simulate", "--trace", trace, "--profile", "toy-cpu", "--out", out, "--csv", out)

    assert "two outputs cannot be one file" in line
    assert not out.exists()


def test_a_wrong_last_run_is_found_before_the_first(trace, refused, tmp_path):
    """Otherwise an hour of simulation ends with a typing error."""
    out = tmp_path / "r.json"
    line = refused(
        "simulate", "--trace", trace, "--profile", "toy-cpu", "--policy", "fcfs", "--policy", "edff", "--out", out
    )

    assert "did you mean 'edf'?" in line
    assert not out.exists()


def test_a_trace_that_cannot_be_read_is_named(tmp_path, refused):
    path = tmp_path / "bad.csv"
    path.write_text("request_id,arrival_s,class,prompt_tokens,output_tokens\n0,-1,latency,1,1\n", encoding="utf-8")

    for command in (
        ["simulate", "--profile", "toy-cpu", "--trace"],
        ["bound", "--profile", "toy-cpu", "--trace"],
        ["trace"],
    ):
        assert f"{path}:2: arrival_s='-1': must not be negative" in refused(*command, path)
        assert "nowhere.csv: cannot be read" in refused(*command, tmp_path / "nowhere.csv")


def test_a_trace_without_a_rate_cannot_be_loaded(tmp_path, refused):
    path = tmp_path / "one.csv"
    path.write_text("request_id,arrival_s,class,prompt_tokens,output_tokens\n0,0,latency,1,1\n", encoding="utf-8")

    line = refused("simulate", "--trace", path, "--profile", "toy-cpu")
    assert "no rate of arrivals" in line
    assert "--load recorded" in line


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["simulate", "--profile", "toy-cpu"], "no workload: give --trace FILE or --generate"),
        (["simulate", "--trace", "t.csv"], "required: --profile"),
        (["simulate", "--profile", "toy-cpu", "--generate", "rate_per_s=0.001", "duration_s=1"], "nothing arrives"),
        (["generate"], "--out: name the file to write"),
        (["generate", "--out", "/dev/null/g.csv", "duration_s=9"], "/dev/null/g.csv: cannot be written"),
        (["generate", "--out", "g.csv", "rate=2"], "rate: no such setting"),
        (["generate", "--out", "g.csv", "rate_per_s=-2"], "rate_per_s=-2: Input should be greater than 0"),
        (["generate", "--out", "g.csv", "rate_per_s"], "expected KEY=VALUE"),
        (["generate", "--out", "g.csv", "rate_per_s=0.001", "duration_s=1"], "nothing arrives"),
        (["convert", "x.csv", "--from", "azur", "--out", "g.csv"], "invalid choice: 'azur'"),
        (["convert", "x.csv", "--from", "azure", "--out", "g.csv", "--rate", "2"], "--rate: azure files have times"),
        (["convert", "x.csv", "--from", "azure", "--out", "g.csv"], "x.csv: cannot be read"),
        (["simulatte"], "invalid choice: 'simulatte'"),
        ([], "required: command"),
    ],
)
def test_a_command_that_makes_no_sense_is_one_line(refused, arguments, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    assert problem in refused(*arguments)
    assert list(tmp_path.glob("*.csv")) == []


def test_targets_can_be_changed_for_a_simulation(trace, tmp_path):
    """The row of halved targets is the row of a file that has halved targets."""
    halved = tmp_path / "small targets x 0.5.csv"
    rows = [line.split(",") for line in trace.read_text(encoding="utf-8").splitlines()]
    columns = [rows[0].index(name) for name in ("slo_ttft_s", "slo_tbt_s", "slo_ttlt_s")]
    for row in rows[1:]:
        for column in columns:
            row[column] = str(float(row[column]) / 2) if row[column] else ""
    halved.write_text("\n".join(map(",".join, rows)) + "\n", encoding="utf-8")
    assert {unit.slo for unit in read_trace(halved).units} == {Latency(1.0, 0.05), Deadline(10.0)}

    found = []
    for arguments in (["--trace", str(trace), "--slo-factor", "0.5"], ["--trace", str(halved)]):
        out = tmp_path / "r.json"
        assert main(["simulate", *arguments, "--profile", "toy-cpu", "--policy", "edf", "--out", str(out)]) == 0
        (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
        found.append({name: value for name, value in row.items() if name != "wall_s"})
    assert found[0] == found[1]


def test_rows_say_what_was_made_of_the_trace_and_of_its_clients(trace, tmp_path):
    """Names as those of benchmarks.goodput, in the order in which the changes were made."""
    out = tmp_path / "r.json"
    base = ["simulate", "--trace", str(trace), "--profile", "toy-cpu", "--policy", "fcfs", "--out", str(out)]

    def row(*options):
        assert main([*base, *options]) == 0
        (found,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
        return found

    assert (row()["trace"], row()["patience"], row()["retries"]) == ("small", None, 0)
    changed = row(
        *("--first-s", "50", "--without-app", "code", "--max-call-tokens", "90", "--no-prefix-cache"),
        *("--slo-unloaded", "3", "--slo-factor", "0.5", "--patience", "1.5", "--retries", "2"),
    )
    assert changed["trace"] == (
        "small first 50 s without code calls to 90 tokens no prefix cache 3x unloaded targets x 0.5"
    )
    assert (changed["patience"], changed["retries"]) == (1.5, 2)


def test_without_a_prefix_cache_no_prompt_is_found_in_one(tmp_path):
    out = tmp_path / "r.json"
    base = "simulate --generate duration_s=20 rate_per_s=1 agent.share=1 --profile llama-3-8b:h100-80g:1 --policy fcfs"
    found = []
    for options in ([], ["--no-prefix-cache"]):
        assert main([*base.split(), *options, "--out", str(out)]) == 0
        found += json.loads(out.read_text(encoding="utf-8"))["rows"]
    cached, uncached = found
    assert cached["prefix_hit_tokens"] > 0 == uncached["prefix_hit_tokens"]
    assert uncached["trace"] == f"{cached['trace']} no prefix cache"
    assert uncached["saturated_tokens_per_s"] < cached["saturated_tokens_per_s"]


def test_the_module_runs_as_the_command_does():
    """It once imported, did nothing and ended with status 0."""
    ended = subprocess.run(
        [sys.executable, "-m", "tempo_router.cli", "--help"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ended.returncode == 0
    assert "simulate" in ended.stdout


def test_a_profile_file_that_is_not_there_is_named_once(capsys):
    options = ["simulate", "--generate", "duration_s=20", "--profile", "mine", "--profile-path", "absent.json"]
    assert main(options) == 2
    assert capsys.readouterr().err == "tempo-router: absent.json: cannot be read: No such file or directory\n"
