"""Whether budgets were kept on images that chose nothing: what all fits of boards of curves would have chosen.

    python -m tests.benchmarks.promises "[runs/compare]"

Each fit has measured the points of its path on one half of the retention images, with bounds, and on the other half.
For each budget the point is taken that its first half chooses, and the other half is counted. Fits of one board share
their images and the pre-trained model, so they are not independent.
"""

from pathlib import Path

from jsonargparse import auto_cli

from flow_lightning.method.budget import last_kept
from flow_lightning.report.metrics import markdown_table, read_metrics

KEEPS = (0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
HEADER = ["fits", "body moved", "kept on the other half", "least above the budget", "mean above the budget"]


def row_of(paths: list[list[dict[str, float]]], keep: float) -> list[str]:
    """Return the cells of a budget: how many fits moved, how many of them kept it, and by how many points."""
    chosen = [path[max(0, last_kept([point["bound"] for point in path], keep))] for path in paths]
    above = [100 * (point["kept_other_half"] - keep) for point in chosen if point["alpha"] > 0]
    spread = [f"{min(above):+.1f}", f"{sum(above) / len(above):+.1f}"] if above else ["–", "–"]
    return [str(len(paths)), str(len(above)), str(sum(each >= 0 for each in above)), *spread]


def main(folders: list[Path], keeps: tuple[float, ...] = KEEPS) -> None:
    """Print a Markdown table, a row for each budget.

    Args:
        folders: Of boards with `-c curve`.
        keeps: Budgets.
    """
    files = [file for folder in folders for file in sorted(folder.rglob("finished.json"))]
    paths = [path for file in files if (path := read_metrics(file)["metrics"].get("path/points"))]
    print(markdown_table(HEADER, [[f"{100 * keep:g} %", *row_of(paths, keep)] for keep in keeps]))


if __name__ == "__main__":
    auto_cli(main)
