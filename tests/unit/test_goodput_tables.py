"""The goodput benchmark's comparisons and tables."""

import pytest

from benchmarks import goodput
from benchmarks.goodput_comparison import (
    AIMS,
    best,
    grouped,
    is_rival,
    line_of,
    measure,
    ours,
    ratio,
    removals,
    settings_of,
)
from benchmarks.goodput_tables import (
    aims_markdown,
    choices_markdown,
    comparison_markdown,
    low_load_markdown,
    policies_markdown,
    replicas_markdown,
    summary_csv,
)
from tempo_router.errors import ConfigError
from tests.goodput_rows import full_rows, goodput_row, only_place

PROFILE = "llama-3-8b:h100-80g:1"


# ---- who is compared with whom


def test_best_rival_has_the_highest_mean_and_is_neither_ours_nor_an_oracle():
    lines = only_place(
        [
            goodput_row("tempo", goodput=3000.0),
            goodput_row("srpt", goodput=2900.0, knowledge="true"),
            goodput_row("edf", goodput=2800.0, knowledge="true"),
            goodput_row("density", goodput=2700.0),
            goodput_row("qoserve", seed=0, goodput=2000.0),
            goodput_row("qoserve", seed=1, goodput=2600.0),
            goodput_row("class_priority", seed=0, goodput=2400.0),
            goodput_row("class_priority", seed=1, goodput=2100.0),
        ]
    )
    assert best(lines, "token_goodput", is_rival).policy == "qoserve"


def test_ratio_is_taken_seed_by_seed_over_common_seeds():
    rows = [
        goodput_row("tempo", seed=0, goodput=3000.0),
        goodput_row("tempo", seed=1, goodput=2000.0),
        goodput_row("tempo", seed=2, goodput=9000.0),
        goodput_row("edf", seed=0, goodput=1500.0),
        goodput_row("edf", seed=1, goodput=2000.0),
    ]
    lines = only_place(rows)
    found = ratio(lines, line_of(rows[0]), line_of(rows[3]))
    assert (found.mean, found.least, found.most, found.against) == (1.5, 1.0, 2.0, "edf")


def test_each_measure_with_an_aim_reads_its_own_column():
    rows = [
        goodput_row("tempo", goodput=3000.0, attainment=0.81, bound_token_goodput=4000.0),
        goodput_row("tempo", goodput=2700.0, objective="balanced", attainment=0.93, worst_class_attainment=0.8),
        goodput_row("jitserve", goodput=1500.0),
        goodput_row("jitserve_tuned", goodput=2000.0),
        goodput_row("qoserve", goodput=2500.0),
    ]
    lines = only_place(rows)
    found = {key: measure(lines, *key) for key in AIMS}
    assert {key: round(one.mean, 4) for key, one in found.items()} == {
        ("token", "jitserve"): 1.5,
        ("token", "rival"): 1.2,
        ("token", "bound"): 0.75,
        ("token", "attained"): 0.9,
        ("token", "ttft"): 0.25,
        ("token", "tbt"): 0.04,
        ("balanced", "rival"): 1.08,
        ("balanced", "attained"): 1.0333,
        ("balanced", "attainment"): 0.93,
        ("balanced", "worst"): 0.8,
        ("balanced", "ttft"): 0.25,
        ("balanced", "tbt"): 0.04,
    }
    assert found["token", "jitserve"].against == "jitserve_tuned"


def test_ours_without_shedding_or_a_part_is_not_ours_complete():
    lines = only_place([goodput_row("tempo", switches={"reserve": False}), goodput_row("edf")])
    assert measure(lines, "token", "rival") is None
    assert [line.role for line in lines] == ["ablation", "rival"]


def test_places_that_differ_in_arrivals_or_engines_are_never_mixed():
    rows = [
        goodput_row(),
        goodput_row(load=2.0),
        goodput_row(time_scale=1.4),
        goodput_row(trace="b"),
    ]
    assert len(grouped(rows)) == 4


def test_a_policy_with_other_slots_is_another_line_at_the_same_place():
    """Arrivals do not depend on slots, so both may be compared with ours, and the better one counts."""
    lines = only_place(
        [
            goodput_row("tempo", goodput=3000.0),
            goodput_row("edf", goodput=1000.0),
            goodput_row("edf", goodput=2000.0, slots=48),
        ]
    )
    assert sorted(line.label for line in lines) == ["edf", "edf 48 slots", "tempo (token)"]
    found = measure(lines, "token", "rival")
    assert (found.mean, found.against) == (1.5, "edf 48 slots")


def test_a_tuned_policy_is_one_line_whatever_was_chosen_where():
    rows = [
        goodput_row("edf", tuned=True, slots=48, sheds=False),
        goodput_row("edf", tuned=True, slots=64, trace="b"),
        goodput_row("tempo"),
        goodput_row("tempo", trace="b"),
    ]
    assert line_of(rows[0]) == line_of(rows[1]) != line_of(goodput_row("edf"))
    assert line_of(rows[0]).label == "edf"
    assert settings_of(rows[:2]) == "64, 48 kept"
    text = policies_markdown(rows, 1.5)
    assert (text.count("| edf | 48 kept |"), text.count("| edf | 64 |")) == (1, 1)
    assert text.count("| **tempo (token)** | 128 |") == 2


def test_ours_is_the_tuned_line_where_there_is_one():
    rows = [goodput_row("tempo"), goodput_row("tempo", slots=64), goodput_row("tempo", slots=32, tuned=True)]
    lines = only_place(rows)
    assert ours(lines, "token").tuned
    assert ours(only_place(rows[:2]), "token").slots == 128


def test_labels_tell_lines_apart():
    variants = [
        {},
        {"objective": "balanced"},
        {"sheds": False},
        {"knowledge": "none"},
        {"switches": {"reserve": False}},
    ]
    labels = [line_of(goodput_row(**values)).label for values in variants]
    assert labels == ["tempo (token)", "tempo (balanced)", "tempo (token) no shedding", "tempo (token) no predictor",
                      "tempo (token) reserve=False"]  # fmt: skip
    assert line_of(goodput_row("edf")).label == "edf"


# ---- tables


def test_a_missed_aim_is_bold_and_a_met_one_is_not():
    rows = [
        goodput_row("tempo", 1.5, goodput=1499.0),
        goodput_row("tempo", 2.0, goodput=1850.0),
        *(goodput_row("jitserve", load, goodput=1000.0) for load in (1.5, 2.0)),
    ]
    text = aims_markdown(rows)
    assert "| **1.499** `jitserve` | 1.850 `jitserve` |" in text
    assert "*≥ 1.500* | *≥ 1.850*" in text


def test_the_aim_for_the_share_of_the_bound_is_shown_with_and_without_a_bound():
    title = "**Token objective: share of the clairvoyant upper bound**"
    without = [goodput_row("tempo", 1.5, goodput=1425.0), goodput_row("edf", 1.5)]
    assert f"{title}\n\nNot computed (`--bound`, `--add-bound`); aim: ≥ 90.0 % at 1.5x." in aims_markdown(without)
    assert "| ≥ 90.0 %, not computed |" in comparison_markdown(without)
    text = aims_markdown([{**row, "bound_token_goodput": 1500.0} for row in without])
    assert f"{title}\n\n| engine | trace | 1.5x |" in text
    assert "| mixed | 95.0 % |\n|  | *aim* | *≥ 90.0 %* |" in text
    assert title not in aims_markdown([goodput_row("edf", 1.5)])
    assert title not in aims_markdown([goodput_row("tempo", 1.5, objective="balanced")])


def test_an_aim_for_a_latency_is_missed_by_more_not_by_less():
    slow = goodput_row("tempo", 1.5, objective="balanced", ttft_p95_s=0.31, tbt_p99_s=0.05)
    text = aims_markdown([slow, goodput_row("tempo", 2.0, objective="balanced", ttft_p95_s=0.2)])
    assert "| **310 ms** | 200 ms |" in text
    assert "| 50 ms | 40 ms |" in text
    assert "*≤ 300 ms*" in text


def test_a_comparison_names_rivals_marks_aims_and_counts_how_often_they_are_met():
    rows = [
        goodput_row("tempo", 1.5, goodput=1499.0, bound_token_goodput=1600.0),
        goodput_row("tempo", 2.0, goodput=1850.0),
        goodput_row("tempo", 1.1, goodput=1100.0),
        *(goodput_row("jitserve", load, goodput=1000.0) for load in (1.1, 1.5, 2.0)),
        goodput_row("tempo", 1.5, trace="b", goodput=1600.0),
        goodput_row("jitserve_tuned", 1.5, trace="b", goodput=1000.0),
    ]
    text = comparison_markdown(rows)
    assert "| mixed | 1.5x | token | 1.499 `jitserve` ✗ | 1.499 `jitserve` ✓ | 93.7 % ✓ |" in text
    assert "| mixed | 2x | token | 1.850 `jitserve` ✓ | 1.850 `jitserve` ✓ | - |" in text
    assert "| b | 1.5x | token | 1.600 `jitserve_tuned` ✓ |" in text
    # A load without aims has figures and no marks.
    assert "| mixed | 1.1x | token | 1.100 `jitserve` | 1.100 `jitserve` | - |" in text
    title = "Token objective: good tokens/s over the better of the JITServe forms"
    assert f"| {title} | ≥ 1.500, met 1 of 2 | ≥ 1.850, met 1 of 1 |" in text
    assert "| Token objective: TTFT P95 of served streams | ≤ 300 ms, met 2 of 2 | ≤ 300 ms, met 1 of 1 |" in text
    assert comparison_markdown([goodput_row("edf")]) == ""


def test_choices_say_what_they_are_worth_against_the_default():
    choice = {"trace": "mixed", "profile": PROFILE, "policy": "edf", "objective": "token", "time_scale": 1.0,
              "kv_scale": 0.25, "slots": 48, "sheds": False,
              "tried": [{"slots": 128, "sheds": True, "token_goodput": 800.0},
                        {"slots": 48, "sheds": False, "token_goodput": 1000.0}]}  # fmt: skip
    assert f"| {PROFILE}, KV x 0.25 | mixed | edf | 48 kept | 1,000 | +25.0 % |" in choices_markdown([choice])
    without_default = {**choice, "tried": choice["tried"][1:]}
    assert "| 48 kept | 1,000 | - |" in choices_markdown([without_default])


def test_tables_have_as_many_cells_as_headings_in_every_row():
    rows = full_rows()
    texts = [
        aims_markdown(rows),
        comparison_markdown(rows),
        policies_markdown(rows, 1.5),
        low_load_markdown(rows),
        goodput.main.__doc__,
    ]
    for text in texts:
        width = None
        for line in text.splitlines():
            if not line.startswith("|"):
                width = None
                continue
            width = width or line.count("|")
            assert line.count("|") == width, line


def test_policies_are_listed_best_first_with_ours_bold_and_oracles_marked():
    names = [
        line.split("|")[1].strip() for line in policies_markdown(full_rows(), 1.5).splitlines() if line.startswith("|")
    ]
    assert names[2:6] == ["**tempo (token)**", "**tempo (balanced)**", "srpt clairvoyant †", "qoserve"]
    assert names[-1] == "fcfs"


def test_every_policy_is_in_the_table_of_where_it_ran_and_targets_have_no_common_mean():
    rows = [
        *(goodput_row("edf", seed=seed, goodput=1000.0 + seed) for seed in (0, 2)),
        goodput_row("edf", trace="mixed 2x unloaded", goodput=3000.0),
        goodput_row("vtc", goodput=500.0),
        goodput_row("edf", 2.0, trace="c"),
        goodput_row("tempo", trace="d", switches={"reserve": False}),
    ]
    tables = policies_markdown(rows, 1.5).split("\n\n")
    assert tables[::2] == [f"**{PROFILE}, mixed, 1.5x**", f"**{PROFILE}, mixed 2x unloaded, 1.5x**"]
    found = [[line.split(" | ")[:4] for line in table.splitlines()[2:]] for table in tables[1::2]]
    assert found == [
        [["| edf", "128", "2", "1,001"], ["| vtc", "128", "1", "500"]],
        [["| edf", "128", "1", "3,000"]],
    ]


def test_low_loads_name_the_best_rival_for_each_measure():
    rows = [
        goodput_row("tempo", 0.9, goodput=990.0, attainment=0.95),
        goodput_row("edf", 0.9, goodput=1000.0, attainment=0.9),
        goodput_row("fcfs", 0.9, goodput=900.0, attainment=1.0),
    ]
    assert "| **-1.00 %** `edf` | **-5.00 %** `fcfs` |" in low_load_markdown(rows)
    near = [goodput_row("tempo", 0.9, goodput=996.0), goodput_row("edf", 0.9, goodput=1000.0)]
    assert "| -0.40 % `edf` |" in low_load_markdown(near)
    assert low_load_markdown([goodput_row("tempo", 1.5)]) == ""


def test_a_removed_part_is_measured_against_the_complete_policy_of_its_seed():
    rows = [
        goodput_row("tempo", seed=0, goodput=1000.0, attainment=0.9),
        goodput_row("tempo", seed=1, goodput=2000.0, attainment=0.8),
        goodput_row("tempo", seed=0, goodput=800.0, attainment=0.7, switches={"reserve": False}),
        goodput_row("tempo", seed=1, goodput=2000.0, attainment=0.8, switches={"reserve": False}),
        goodput_row("tempo", seed=0, goodput=1100.0, attainment=0.9, knowledge="true"),
    ]
    found = {removal.part: removal for removal in removals(rows)}
    assert found["without reserve"].goodput == pytest.approx(0.9)
    assert found["without reserve"].attainment == pytest.approx(-0.1)
    assert found["clairvoyant"].goodput == pytest.approx(1.1)


def test_replicas_that_were_not_enough_are_said_to_be_more_than_the_most():
    need = {"trace": "mixed", "profile": PROFILE, "rate": 2.0, "policy": "edf", "objective": "token", "replicas": None,
            "most": 16, "attainment": 0.4}  # fmt: skip
    assert "| 2 | edf | > 16 | 40.0 % |" in replicas_markdown([need])


def test_summary_has_one_line_for_each_policy_and_place():
    rows = full_rows()
    lines = summary_csv(rows, is_complete=True).splitlines()
    assert len(lines) == 1 + sum(len(lines) for lines in grouped(rows).values())
    assert len({line.count(",") for line in lines}) == 1
    assert lines[0].endswith(",bound_token_goodput,wall_s")
    assert {line.split(",")[-1] for line in lines[1:]} == {"12"}


def test_rows_of_two_traces_with_one_name_are_refused():
    rows = [goodput_row(seed=0), goodput_row(seed=1, trace_digest="fedcba9876543210")]
    with pytest.raises(ConfigError, match=r"two different traces are called 'mixed' .*0123456789abcdef.*fedcba"):
        grouped(rows)


def test_where_all_keep_hopeless_work_ours_is_compared_too_and_one_that_drops_it_goes_before():
    kept = [goodput_row("tempo", sheds=False), goodput_row("fcfs", sheds=False, goodput=500.0)]
    found = measure(only_place(kept), "token", "rival")
    assert found is not None
    assert (found.mean, found.against) == (4.0, "fcfs no shedding")
    both = only_place([*kept, goodput_row("tempo", goodput=1000.0)])
    line = ours(both, "token")
    assert line is not None
    assert line.sheds


def test_a_comparison_without_aims_marks_nothing():
    rows = full_rows(loads=(1.5,))
    assert "✗" in comparison_markdown(rows)
    plain = comparison_markdown(rows, {})
    assert not {"✓", "✗"} & set(plain)
    assert "| 1.5x | balanced |" in plain
