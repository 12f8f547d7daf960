"""The page of a board: whole, killed, of one run, of runs that diverged."""

import json
from pathlib import Path

import pytest

from flow_lightning.report.page.board_page import board_sections, configuration, is_board
from flow_lightning.report.page.render import page
from tests.report.page.example import EVIL, METRICS, Parsed

COLUMNS = "method,optimizer,rate,seed,alpha,target,retention,target_choosing,retention_choosing,folder\n"


def write_fit(folder, method, seed, metrics):
    file = folder / method / f"seed-{seed}" / "finished.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"words": ["fit", "-c", EVIL, f"--method={method}"], "metrics": metrics}))


@pytest.mark.usefixtures("rendered")
def test_a_board_draws_every_point_and_names_it():
    folder = Path("board")
    for seed in (1, 2):
        write_fit(folder, "flow", seed, METRICS)
    (folder / "comparison.json").write_text(json.dumps({"flow": [METRICS, METRICS], EVIL: [METRICS]}))
    (folder / "board.csv").write_text(f"{COLUMNS}flow,,0.1,1,0.5,0.8,0.9,0,0,x\n{EVIL},sgd,,2,1,0.7,0.6,0,0,y\n")
    assert is_board(folder)
    found = Parsed(page(folder))
    marks = [tags["aria-label"] for _, tags in found.tags if tags.get("class") == "mark"]
    assert marks == [
        "flow, rate 0.1, seed 1, alpha 0.5: learned 80, kept 90",
        f"{EVIL} sgd, rate default, seed 2, alpha 1: learned 70, kept 60",
    ]
    assert "3 runs of 2 methods" in found.text and "75.0 ± 0.0 %" in found.text and len(found.scripts) == 1


def test_a_killed_board_of_one_run_says_so():
    folder = Path("board")
    write_fit(folder, "flow", 1, METRICS)
    sections, missing = board_sections(folder)
    assert sections[0].text == ["1 run of 1 method: flow."] and "not finished" in missing[0]
    assert len(sections[1].charts) == 1
    assert configuration(folder) == f"flow-lightning fit -c {EVIL} --method=flow"


def test_runs_that_diverged_are_counted_and_a_board_without_numbers_has_no_chart():
    folder = Path("board")
    write_fit(folder, "flow", 1, {"diverged": "NaN"})
    sections, _ = board_sections(folder)
    assert "1 of them diverged" in sections[0].text[1] and "nothing to draw" in sections[1].text[0]


@pytest.mark.usefixtures("rendered")
def test_up_and_right_is_better_also_where_lower_numbers_are():
    folder, run = Path("board"), {"target/loss": 0.3, "retention/after/perplexity": 21.0}
    better = {"target/loss": 0.2, "retention/after/perplexity": 20.0}
    folder.mkdir()
    (folder / "comparison.json").write_text(json.dumps({"plain": [run], "flow": [better]}))
    (chart,) = board_sections(folder)[0][1].charts
    assert chart.axes.get_xlabel() == "kept: perplexity of general text (lower is better)"
    assert chart.axes.get_ylabel() == "learned: target loss (lower is better)"
    assert chart.axes.xaxis_inverted() and chart.axes.yaxis_inverted()
