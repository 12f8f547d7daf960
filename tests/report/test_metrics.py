"""`metrics.json`, the table of a run or a comparison, and the table of keys in the documentation."""

import json
import math
import re

import numpy as np
import pytest
from rich.console import Console

from flow_lightning.report import metrics as m
from flow_lightning.report.metrics import (
    declared_by,
    main_panel,
    metrics_table,
    path_table,
    read_metrics,
    results_markdown,
    write_metrics,
)
from tests.retention import RUN, UNLABELLED, SizeOfHead


def printed(table):
    console = Console(width=200, record=True)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_metrics_are_sorted_an_older_file_is_replaced_and_what_is_not_finite_is_null(tmp_path):
    path = tmp_path / "run" / "metrics.json"
    write_metrics(path, {"a": 1})
    write_metrics(path, {"c": [{"epoch": 1, "kl": math.inf}], "a": 2, "b": math.nan})
    assert read_metrics(path) == {"a": 2, "b": None, "c": [{"epoch": 1, "kl": None}]}
    assert list(json.loads(path.read_text())) == ["a", "b", "c"] and "NaN" not in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("content", ["[1]", "{"])
def test_a_file_of_another_kind_is_named(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.json"):
        read_metrics(path)


def test_table_shows_mean_and_standard_deviation():
    accuracies = [0.79, 0.80, 0.84]
    text = printed(metrics_table({"plain": [RUN | {"target/top1": a} for a in accuracies], "flow": UNLABELLED}))
    mean, spread = 100 * np.mean(accuracies), 100 * np.std(accuracies, ddof=1)
    assert f"{mean:.1f} ± {spread:.1f} %" in text
    assert "80.0 %" in text and "plain" in text and "flow" in text
    assert "–" in text  # accuracy on the pre-trained task is missing in one column


def test_table_has_a_row_for_each_finite_number_and_for_each_task_after_their_mean():
    tasks = {"retention/after/task/mmlu": 0.4, "retention/after/task/arc": 0.6, "retention/after/accuracy": 0.5}
    text = printed(metrics_table({"value": tasks | {"target/top1": 0.5, "retention/after/kl": None}}))
    rows = [line.split("│")[1].strip() for line in text.splitlines() if "%" in line]
    assert rows == ["target accuracy", "mean accuracy of the tasks", "task arc", "task mmlu"] and "KL" not in text


@pytest.mark.parametrize("methods", [1, 3, 4, 9])
@pytest.mark.parametrize("length", [4, 13, 60])
def test_no_number_is_broken_however_many_and_long_the_names_are(methods, length, capsys):
    values = [[0.5 + column / 100, 0.52 + column / 100] for column in range(methods)]
    names = [f"{column}{'n' * length}" for column in range(methods)]
    runs = {name: [{"target/top1": value} for value in both] for name, both in zip(names, values)}
    m.print_table(metrics_table(runs, "A title"), f"/a/{'long/' * 30}path")
    text, _, last = capsys.readouterr().out.partition("/a/")
    assert max(map(len, text.splitlines())) <= 80 and text.count("A title") == 1 and last.endswith("/path\n")
    for low, high in values:
        assert text.count(f"{50 * (low + high):.1f} ± {100 * (high - low) / 2**0.5:.1f} %") == 1
    assert text.count("n") >= methods * length, "a name is folded, not cut"


def test_columns_without_room_stand_below_with_the_names_of_the_rows(capsys):
    runs = {f"method_{letter}": [RUN, RUN | {"target/top1": 0.85}] for letter in "abcdef"}
    m.print_table(metrics_table(runs), "")
    lines = capsys.readouterr().out.splitlines()
    heads = [re.findall("method_[a-f]", line) for line in lines if "method_" in line]
    assert heads == [["method_a", "method_b", "method_c"], ["method_d", "method_e", "method_f"]]
    rows = [line for line in lines if "82.5 ± 3.5 %" in line]
    assert len(rows) == 2 and all(line.startswith("│ target accuracy ") for line in rows)


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        (RUN, {"average": 0.6, "average_original_bn": 0.61}),
        (UNLABELLED, {"average": 0.75}),
        ({"target/exact_match": 0.3, "target/loss": 1.0, "retention/after/accuracy": 0.5}, {"average": 0.4}),
        ({"target/loss": 1.0, "retention/after/accuracy": 0.5}, {}),
        ({"target/exact_match": 0.3, "retention/after/perplexity": 20.0}, {}),
        ({"target/top1": 0.8}, {}),
    ],
)
def test_only_fractions_are_averaged(metrics, expected):
    assert m.averages(metrics) == pytest.approx(expected)


def test_the_first_result_that_a_run_has_leads():
    runs = [{"target/loss": 1.0, "target/exact_match": None}, {"retention/after/perplexity": 20.0}]
    assert main_panel("target", runs).main == "target/loss"
    assert main_panel("target", [*runs, {"target/exact_match": 0.1}]).main == "target/exact_match"
    assert main_panel("retention", runs).main == "retention/after/perplexity"
    assert main_panel("retention", runs[:1]) is None


def test_a_measure_of_ones_own_is_shown():
    declared, run = declared_by([SizeOfHead()]), {"retention/after/size": 3.14159}
    assert "3.142" in printed(metrics_table({"value": run}, declared=declared))
    assert main_panel("retention", [run], declared).title == "size of the head"
    assert "size of the head" not in printed(metrics_table({"value": run}))


def test_the_table_of_a_path_marks_the_chosen_point():
    points = [{"alpha": a, "kept": 1.0, "bound": 0.99, "target_loss": 0.5, "target_top1": 0.75} for a in (0.25, 0.5)]
    rows = [line for line in printed(path_table(points, 0.5, "agreement")).splitlines() if "99.0 %" in line]
    assert ["chosen" in row for row in rows] == [False, True] and all(
        "0.500" in row and "75.0 %" in row for row in rows
    )
    assert "validation" in printed(path_table(points, 0.5, "agreement"))
    for point in points:
        del point["target_top1"]
    text = printed(path_table(points, 0.5, "agreement"))
    assert "training" in text and "validation" not in text


def test_every_key_is_declared_once():
    keys = [metric.key for metric in m.METRICS]
    assert len(keys) == len(set(keys))
    assert {"target/top1", "target/hard_top1", "average", "flow/temperature", "flow/mean_weight"} <= set(keys)


def test_results_have_a_row_for_each_method_and_the_groups_in_place_of_their_tasks():
    def run(gsm8k, *general):
        groups = dict(zip(("commonsense", "mmlu"), general))
        tasks = {"target/task/gsm8k": gsm8k, "retention/after/task/piqa": 0.9}
        means = {"target/accuracy": gsm8k, "retention/after/accuracy": sum(general) / 2}
        tables = {f"retention/after/group/{name}": value for name, value in groups.items()}
        return tasks | means | tables | {"target/group/gsm8k": gsm8k, "flow/temperature": 3.0, "time/fit_s": 1.0}

    before = {"target/before/accuracy": 0.25, "target/before/group/gsm8k": 0.25, "retention/before/accuracy": 0.45}
    before |= {"retention/before/group/commonsense": 0.5, "retention/before/group/mmlu": 0.4}
    plain = [run(0.5, 0.4, 0.2) | m.averages(run(0.5, 0.4, 0.2)), run(0.7, 0.4, 0.2) | {"average": 0.6}]
    assert results_markdown({"standard": [{**before, **each} for each in plain], "flow": [run(0.6, 0.5, 0.3)]}) == (
        "| | gsm8k | mean accuracy of the tasks | commonsense | mmlu | average of target and pre-trained task |\n"
        "|---|---:|---:|---:|---:|---:|\n"
        "| before training | 25.0 ± 0.0 % | 45.0 ± 0.0 % | 50.0 ± 0.0 % | 40.0 ± 0.0 % | 35.0 ± 0.0 % |\n"
        "| standard | 60.0 ± 14.1 % | 30.0 ± 0.0 % | 40.0 ± 0.0 % | 20.0 ± 0.0 % | 50.0 ± 14.1 % |\n"
        "| flow | 60.0 % | 40.0 % | 50.0 % | 30.0 % | – |\n"
    )


def test_results_name_a_measure_with_a_bar_and_leave_out_sizes():
    text = results_markdown({"a": [{"retention/after/kl": 0.5, "target/samples": 9}]})
    assert text.splitlines()[0] == "| | KL(pre-trained \\|\\| fine-tuned) |"
