"""The goodput benchmark's pictures and reports."""

import itertools

import numpy as np
import pytest
from PIL import Image

from benchmarks import goodput, goodput_plan
from benchmarks.goodput_comparison import best, is_jitserve, line_of
from benchmarks.goodput_plots import draw_all, highlighted, line_colours, spread_apart
from benchmarks.goodput_report import BEGIN_MARK, END_MARK, Results, read_results, report_markdown, write_report
from tempo_router.errors import ConfigError
from tests.goodput_rows import full_rows, goodput_row, only_place

PROFILE = "llama-3-8b:h100-80g:1"


# ---- pictures


def test_pictures_are_drawn_small_and_the_same_twice(tmp_path):
    first = draw_all(full_rows(), tmp_path / "a")
    again = draw_all(full_rows(), tmp_path / "b")
    assert {kind: len(paths) for kind, paths in first.items()} == {
        "load": 1, "classes": 1, "distributions": 1, "ablation": 1,
    }  # fmt: skip
    for paths, copies in zip(first.values(), again.values(), strict=True):
        for path, copy in zip(paths, copies, strict=True):
            assert path.read_bytes() == copy.read_bytes()
            assert path.stat().st_size < 100_000
            with Image.open(path) as image:
                # Not an empty sheet: ink where lines and bars should be.
                assert np.asarray(image.convert("L")).std() > 10


def test_one_load_of_one_policy_is_enough_for_the_pictures_that_need_no_more(tmp_path):
    drawn = draw_all([goodput_row("fcfs", lateness_cdf={}, ttft_cdf=None)], tmp_path)
    assert {kind: len(paths) for kind, paths in drawn.items()} == {
        "load": 0, "classes": 1, "distributions": 1, "ablation": 0,
    }  # fmt: skip


def test_work_without_any_target_has_pictures_too(tmp_path):
    nothing = {"attainment": 0.0, "attainment_by_class": {}, "token_goodput_by_class": {}, "lateness_cdf": {}}
    rows = [goodput_row(policy, load, goodput=0.0, **nothing) for policy in ("tempo", "fcfs") for load in (1.0, 1.5)]
    drawn = draw_all(rows, tmp_path)
    assert {kind: len(paths) for kind, paths in drawn.items()} == {
        "load": 1, "classes": 1, "distributions": 1, "ablation": 0,
    }  # fmt: skip


def test_our_lines_and_leading_rivals_have_colours_of_their_own_and_weak_ones_none():
    rows = full_rows()
    colours = line_colours(rows)
    named = {line.label: colour for line, colour in colours.items()}
    assert {"tempo (token)", "tempo (balanced)", "qoserve", "jitserve_tuned"} <= set(named)
    assert "fcfs" not in named
    assert len(set(named.values())) == len(named)
    lines = only_place(full_rows(loads=(1.5,)))
    assert {line.policy for line in highlighted(lines)} == {"qoserve", "jitserve_tuned"}
    assert best(lines, "token_goodput", is_jitserve).policy == "jitserve_tuned"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.0, 0.0, 0.5], [0.0, 0.1, 0.5]),
        ([1.0, 1.0], [0.9, 1.0]),
        ([0.5, 0.52, 0.58], [0.43333, 0.53333, 0.63333]),
    ],
)
def test_labels_move_apart_no_further_than_they_must(wanted, expected):
    assert spread_apart(wanted, 0.1, 0.0, 1.0) == pytest.approx(expected, abs=1e-4)


def test_many_labels_keep_their_distance():
    heights = spread_apart(sorted(abs(np.sin(i)) for i in range(9)), 0.1, 0.0, 1.0)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(heights))
    assert heights[0] >= 0
    assert heights[-1] <= 1


# ---- reports


def results_of(rows, path):
    parsed = goodput._parse(["--out", str(path)])
    conditions = {**goodput_plan.plan_of(parsed).conditions, "date": "2026-01-01"}
    return Results(path, conditions, rows, is_complete=True)


def test_a_report_has_conditions_tables_pictures_and_columns_and_leaves_what_people_wrote_around_it(tmp_path):
    path = tmp_path / "results.md"
    path.write_text(f"# Ours\n\nbefore\n\n{BEGIN_MARK}\nold\n{END_MARK}\n\nafter\n")
    write_report(path, [results_of(full_rows(), tmp_path / "r.json")])
    text = path.read_text()
    assert text.startswith(f"# Ours\n\nbefore\n\n{BEGIN_MARK}\n")
    assert text.endswith(f"{END_MARK}\n\nafter\n")
    assert "\nold\n" not in text
    assert "| all tokens/s of the run |" in text
    assert "What is good is per second of arrivals, all tokens are per second of the whole run" in text
    for title in ("Conditions", "Comparison", "Aims", "Over the load", "All policies", "By class", "Distributions",
                  "Up to 0.9x", "What each part is worth", "Columns of the rows"):  # fmt: skip
        assert f"\n## {title}\n" in text, title
    linked = [part.split(")")[0] for part in text.split("](")[1:]]
    assert len(linked) == 4
    assert all((tmp_path / path).is_file() for path in linked)
    assert (tmp_path / "results" / "summary.csv").is_file()


def test_a_file_without_marks_is_not_overwritten(tmp_path):
    path = tmp_path / "notes.md"
    path.write_text("mine\n")
    with pytest.raises(ConfigError, match="has no marks"):
        write_report(path, [results_of(full_rows(), tmp_path / "r.json")])
    assert path.read_text() == "mine\n"


@pytest.mark.parametrize("render", [False, True])
@pytest.mark.parametrize(
    ("report", "problem"),
    [
        ("/dev/null/x.md", "cannot be written: /dev/null"),
        ("folder.d", "name a Markdown file"),
        ("report", "name a Markdown file"),
        ("taken.md", "cannot be written"),
        ("notes.md", "has no marks"),
        ("latin.md", "cannot be read"),
        ("r.json", "is read or written already"),
        ("r.json.md", "r.json is read or written already"),
    ],
)
def test_a_report_that_cannot_be_written_is_found_before_the_first_run(
    tmp_path, monkeypatch, capsys, report, problem, render
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.d").mkdir()
    (tmp_path / "taken").write_text("where the pictures of taken.md would go")
    (tmp_path / "notes.md").write_text("mine\n")
    (tmp_path / "latin.md").write_bytes(b"\xe4\n")
    results_of(full_rows(), tmp_path / "r.json").write(is_complete=True)
    before = (tmp_path / "r.json").read_bytes()

    def never(*_):
        pytest.fail("a run was started")

    monkeypatch.setattr(goodput, "process_pool", never)
    arguments = ["--render", "r.json"] if render else ["--out", "r.json"]
    assert goodput.main([*arguments, "--report", report]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert problem in said
    assert (tmp_path / "r.json").read_bytes() == before


def test_conditions_say_what_ran_how_often_where_it_differs(tmp_path):
    rows = [goodput_row(policy, load, seed) for policy in ("edf", "vtc") for load in (1.0, 1.5) for seed in (0, 1)]
    text = report_markdown([results_of(rows, tmp_path / "r.json")], {}, 1.5)
    assert "; 8 runs: seed 0, 1; load 1, 1.5; objective token; policy edf, vtc; shedding" in text
    text = report_markdown([results_of(rows[:-1], tmp_path / "r.json")], {}, 1.5)
    assert "; 7 runs: seed 0 (4), 1 (3); load 1 (4), 1.5 (3); objective token; policy edf (4), vtc (3);" in text


def test_failed_cells_are_named_in_the_report(tmp_path):
    results = results_of(full_rows(), tmp_path / "r.json")
    results.failures.append({"policy": "vtc", "error": "KeyError: 'x'"})
    text = report_markdown([results], {}, 1.5)
    assert "**1 cells failed and are missing below:** `vtc` (KeyError: 'x')." in text


def test_a_report_of_a_run_that_was_interrupted_says_so_at_its_top_and_a_whole_one_does_not(tmp_path, capsys):
    rows = [goodput_row("fcfs", seed=seed, lateness_cdf={}, ttft_cdf=None) for seed in (0, 1)]
    whole, part = results_of(rows, tmp_path / "whole.json"), results_of(rows[:1], tmp_path / "part.json")
    whole.write(is_complete=True)
    part.write(is_complete=False)
    report = tmp_path / "report.md"

    def rendered(*results):
        assert goodput.main(["--render", *(str(one.path) for one in results), "--report", str(report)]) == 0
        summary = (tmp_path / "report" / "summary.csv").read_text().splitlines()
        return report.read_text(), {line.split(",")[0] for line in summary[1:]}, capsys.readouterr().err

    text, marks, said = rendered(whole, part)
    (mark,) = (line for line in text.splitlines() if "INCOMPLETE" in line)
    assert mark.startswith("**INCOMPLETE")
    assert "`part.json` (1 runs)" in mark
    assert "whole.json" not in mark
    assert text.index(mark) < text.index("## Conditions")
    assert marks == {"false"}
    assert said == f"{part.path}: INCOMPLETE, 1 runs; the report says so\n"

    text, marks, said = rendered(whole)
    assert ("INCOMPLETE" in text, marks, said) == (False, {"true"}, "")


def test_a_file_that_is_no_result_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"complete": true, "version": "0.1.0", "rows": []}')
    with pytest.raises(
        ConfigError, match=r"not a result of .*: it has no 'conditions'; files of tempo-router simulate"
    ):
        read_results(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="not a result of"):
        read_results(path)


def test_what_else_a_benchmark_found_survives_a_rewrite(tmp_path):
    """As when bounds are added to the rows of a live run."""
    results = results_of([goodput_row("fcfs")], tmp_path / "live.json")
    results.further = {"summary": [{"load": 1.5, "policy": "fcfs"}], "truth": [{"step_error": [0.1]}]}
    results.write(is_complete=True)
    written = results.path.read_bytes()

    again = read_results(results.path)
    assert again.further == results.further
    again.write(is_complete=True)
    assert results.path.read_bytes() == written


def test_lines_have_a_total_order():
    lines = [line_of(goodput_row(policy)) for policy in ("edf", "tempo", "bros")]
    assert [line.policy for line in sorted(lines)] == ["bros", "edf", "tempo"]
