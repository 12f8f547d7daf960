import csv
import json
import math
import re
from itertools import product
from pathlib import Path
from typing import Any

from flow_lightning.report.board import COLUMNS, report


def fits() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Two methods, two rates and two seeds; flow is 3 points better everywhere."""
    settings, found = [], []
    for seed, (method, gain), rate in product((1, 2), (("standard", 0.0), ("flow", 0.03)), (0.001, 0.004)):
        varied = {"method": method, "rate": rate, "seed": seed}
        settings.append({"optimizer": None, "noise": None, "folder": "x"} | varied)
        ends = [(0.0, 0.5, 1.0), (0.5, 0.6 + gain + seed / 100, 0.985), (1.0, 0.7 + gain + 10 * rate, 0.9)]
        points = [{"alpha": a, "test_top1": t, "target_top1": t, "kept_other_half": r, "kept": r} for a, t, r in ends]
        for each in points:
            each["test_hard_top1"] = each["alpha"] / 4 + gain
        measured = {"target/top1": 0.7, "retention/after/top1": 0.4, "budget/alpha": 0.5, "budget/keep": 0.98}
        found.append(measured | {"path/points": points})
    return settings, found


def draw(runs: dict[str, Any], settings: Any, found: Any, folder: Path) -> None:
    (folder / "comparison.json").write_text(json.dumps(runs))
    report(runs, settings, found, folder)


def test_a_row_for_each_point_a_table_and_a_picture(tmp_path: Path, capsys: Any, rendered: None) -> None:
    settings, found = fits()
    draw({"standard": found[:2], "flow": found[2:4]}, settings, found, tmp_path)
    rows = list(csv.DictReader((tmp_path / "board.csv").open()))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 8 * 3
    assert rows[1] == {
        **{"method": "standard", "optimizer": "", "rate": "0.001", "noise": "", "seed": "1"},
        **{"alpha": "0.5", "target": "0.61", "is_chosen": "1"},
        **{"retention": "0.985", "target_choosing": "0.61", "retention_choosing": "0.985", "folder": "x"},
        "target_of": "accuracy",
        "target_hard": "0.125",
    }
    tables = [each.splitlines() for each in re.findall(r"(?:^\|.*\n)+", (tmp_path / "board.md").read_text(), re.M)]
    header, _, standard, flow = tables[0]
    assert header.split(" | ")[1] == "target at 0.95"
    assert standard.split(" | ")[2] == "61.5" and flow.split(" | ")[2] == "64.5"
    assert "+3.0 (+3.0 to +3.0)" in flow
    # By hand: at alpha 0 all have 0.5; at the others flow has 3 points more, on hard ones everywhere.
    assert [line.strip("| ").split(" | ") for line in tables[1][2:]] == [
        ["standard 0.001", "0.5", "61.5", "98.5", "71.0", "90.0", "12.5", "25.0", "50.0"],
        ["standard 0.004", "0.5", "61.5", "98.5", "74.0", "90.0", "12.5", "25.0", "50.0"],
        ["flow 0.001", "0.5", "64.5", "98.5", "74.0", "90.0", "15.5", "28.0", "50.0"],
        ["flow 0.004", "0.5", "64.5", "98.5", "77.0", "90.0", "15.5", "28.0", "50.0"],
    ]
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "comparison.md").exists(), "several rates: its columns would say nothing"
    assert "Target under a budget" in capsys.readouterr().out


def test_with_one_seed_a_difference_has_no_interval(tmp_path: Path, rendered: None) -> None:
    settings, found = fits()
    draw({"standard": found[:2], "flow": found[2:4]}, settings[:4], found[:4], tmp_path)
    flow = (tmp_path / "board.md").read_text().splitlines()[3]
    assert flow.startswith("| flow |") and " | +3.0 | " in flow and " to " not in flow


def test_of_text_the_board_shows_the_probability_of_the_right_tokens(
    tmp_path: Path, rendered: None, monkeypatch: Any
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("flow_lightning.report.frontier_picture.plot_frontier", lambda *given: shown.append(given[3]))
    settings, found = fits()
    for metrics in found:
        losses = [{"alpha": a, "test_loss": 2.0 - a, "validation_loss": 2.1 - a} for a in (0.0, 0.5, 1.0)]
        others = {"target_loss": 9.9, "kept": 1.0}  # of the training, with its weights
        metrics["path/points"] = [each | others | {"kept_other_half": 1.0 - 0.1 * each["alpha"]} for each in losses]
    draw({"standard": found[:4], "flow": found[4:]}, settings, found, tmp_path)
    rows = list(csv.DictReader((tmp_path / "board.csv").open()))
    for row in rows:
        alpha = float(row["alpha"])
        assert math.isclose(float(row["target"]), math.exp(alpha - 2))
        assert math.isclose(float(row["target_choosing"]), math.exp(alpha - 2.1))
    assert len(rows) == 8 * 3 and {row["target_of"] for row in rows} == {*shown} == {"token probability"}
    assert "target token probability (%)" in (tmp_path / "report.html").read_text()


def test_fits_without_a_path_have_the_plain_comparison_alone(tmp_path: Path, rendered: None) -> None:
    settings, found = fits()
    plain = [{"target/top1": 0.7, "retention/after/top1": 0.4} for _ in found]
    one_rate = [setting | {"rate": None} for setting in settings]
    draw({"standard": plain[:4], "flow": plain[4:]}, one_rate, plain, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.json", "comparison.md", "report.html"]
    assert "| flow | 70.0 ± 0.0 % | 40.0 ± 0.0 % |" in (tmp_path / "comparison.md").read_text()


def test_shares_of_wrong_labels_have_panels_and_rows_of_their_own(
    tmp_path: Path, capsys: Any, rendered: None, monkeypatch: Any
) -> None:
    panels: list[dict[str, Any]] = []
    monkeypatch.setattr("flow_lightning.report.frontier_picture.plot_frontier", lambda p, *_: panels.append(p))
    settings, found = fits()
    noisy = [setting | {"noise": 0.3 * (setting["rate"] > 0.002), "rate": None} for setting in settings]
    draw({"standard": found[:4], "flow": found[4:]}, noisy, found, tmp_path)
    assert {title: len(points) for title, points in panels[0].items()} == {"Clean labels": 12, "30 % wrong labels": 12}
    assert not (tmp_path / "comparison.md").exists(), "its columns would mix clean and wrong labels"
    text = (tmp_path / "board.md").read_text()
    assert text.startswith("**Clean labels**\n\n| ") and "\n\n**30 % wrong labels**\n\n| " in text
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "frontier.png" not in line) <= 80
    titles = [line.split(":")[0].strip() for line in lines if "labels: within the budget" in line]
    assert titles == ["Clean labels", "30 % wrong labels"]
    rows = [line.replace("│", " ").split() for line in lines if line.startswith(("│ standard", "│ flow"))]
    # Means of seeds 1 and 2, at alpha 0.5 and at alpha 1.
    assert rows == [
        ["standard", "0.5", "61.5", "98.5", "71.0", "90.0"],
        ["flow", "0.5", "64.5", "98.5", "74.0", "90.0"],
        ["standard", "0.5", "61.5", "98.5", "74.0", "90.0"],
        ["flow", "0.5", "64.5", "98.5", "77.0", "90.0"],
    ]
    assert lines[-1] == f"comparison.json, board.csv, board.md, frontier.png, report.html: {tmp_path}"
