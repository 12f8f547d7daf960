import csv
from pathlib import Path
from typing import Any

from flow_lightning.report.board import COLUMNS, report


def fits() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Two methods, two rates and two seeds; flow is 3 points better everywhere."""
    settings, found = [], []
    for seed in (1, 2):
        for method, gain in (("standard", 0.0), ("flow", 0.03)):
            for rate in (0.001, 0.004):
                settings.append({"method": method, "optimizer": None, "rate": rate, "seed": seed, "folder": "x"})
                ends = [(0.0, 0.5, 1.0), (0.5, 0.6 + gain + seed / 100, 0.985), (1.0, 0.7 + gain + 10 * rate, 0.9)]
                points = [
                    {"alpha": a, "test_top1": t, "target_top1": t, "kept_other_half": r, "kept": r} for a, t, r in ends
                ]
                found.append({"path/points": points, "target/top1": 0.7, "retention/after/top1": 0.4})
    return settings, found


def test_a_row_for_each_point_a_table_and_a_picture(tmp_path: Path, capsys: Any, rendered: None) -> None:
    settings, found = fits()
    report({"standard": found[:2], "flow": found[2:4]}, settings, found, tmp_path)
    rows = list(csv.DictReader((tmp_path / "board.csv").open()))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 8 * 3
    assert rows[1] == {
        **{"method": "standard", "optimizer": "", "rate": "0.001", "seed": "1", "alpha": "0.5", "target": "0.61"},
        **{"retention": "0.985", "target_choosing": "0.61", "retention_choosing": "0.985", "folder": "x"},
    }
    header, _, standard, flow = (tmp_path / "board.md").read_text().splitlines()
    assert header.split(" | ")[1] == "target at 0.95"
    assert standard.split(" | ")[2] == "61.5" and flow.split(" | ")[2] == "64.5"
    assert "+3.0 (+3.0 to +3.0)" in flow
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "comparison.png").exists(), "several rates: bars would say nothing"
    assert "Target under a budget" in capsys.readouterr().out


def test_fits_without_a_path_have_the_plain_comparison_alone(tmp_path: Path, rendered: None) -> None:
    settings, found = fits()
    plain = [{"target/top1": 0.7, "retention/after/top1": 0.4} for _ in found]
    one_rate = [setting | {"rate": None} for setting in settings]
    report({"standard": plain[:4], "flow": plain[4:]}, one_rate, plain, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.png"]
