"""Everything that a GPU is to show, in minutes, without network: correctness first, then speed and memory.

    python -m tests.benchmarks.gpu --out FOLDER [--device cuda] [--seconds 120] [--tiny]

Each part runs in a process of its own with a time limit of its own, and its rows are written at once to
`FOLDER/PART.json`; `FOLDER/gpu.md` is the table so far. `--tiny` has sizes for a CPU. Models have random parameters.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from tests.benchmarks.gpu.correctness import correctness
from tests.benchmarks.gpu.language import language
from tests.benchmarks.gpu.processes import processes
from tests.benchmarks.gpu.rows import Row, skipped
from tests.benchmarks.gpu.trainers import trainers
from tests.benchmarks.gpu.vision import vision

PARTS = {
    "correctness": correctness,
    "processes": processes,
    "vision": vision,
    "language 135M": language,
    "language 1B": partial(language, geometry="1B"),
    "language 2B": partial(language, geometry="2B"),
    "trainers": trainers,
}


def write(folder: Path, part: str, rows: list[Row]) -> None:
    """Write the rows of a part."""
    (folder / f"{part}.json").write_text(json.dumps(rows))


def rows_in(folder: Path, part: str) -> list[Row]:
    """Read the rows of a part, none if it has not been run or has failed."""
    file = folder / f"{part}.json"
    return json.loads(file.read_text()) if file.exists() else []


def table(folder: Path) -> str:
    """Make one Markdown table of the parts that are written."""
    lines = ["| Part | What | Value | Unit | Bound |", "|---|---|---:|---|---:|"]
    for name in PARTS:
        for each in rows_in(folder, name):
            value, bound = ("" if each[key] is None else f"{each[key]:.4g}" for key in ("value", "bound"))
            lines.append(f"| {name} | {each['what']} | {value} | {each['unit']} | {bound} |")
    return "\n".join(lines) + "\n"


def run_part(arguments: argparse.Namespace) -> None:
    """Run one part here, and write its rows."""
    torch.manual_seed(0)
    write(arguments.out, arguments.part, PARTS[arguments.part](arguments.device, arguments.tiny))


def run_all(arguments: argparse.Namespace) -> int:
    """Run each part in a process of its own; return how many failed or came out wrong."""
    failed = 0
    for name in PARTS:
        (arguments.out / f"{name}.json").unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.benchmarks.gpu", *sys.argv[1:], "--part", name]
        try:
            code = subprocess.run(command, timeout=arguments.seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            code = 1
            print(f"{name} took more than {arguments.seconds} seconds.")
        if code != 0:
            failed += 1
            write(arguments.out, name, [skipped("all of it", f"failed or took over {arguments.seconds:g} s")])
        (arguments.out / "gpu.md").write_text(table(arguments.out))
    print(table(arguments.out))
    return failed + wrong(arguments.out)


def wrong(folder: Path) -> int:
    """Count the values beyond their bound."""
    rows = [each for name in PARTS for each in rows_in(folder, name)]
    return sum(each["bound"] is not None and not each["value"] <= each["bound"] for each in rows)


def main() -> int:
    """Read the options, and run one part or all."""
    parser = argparse.ArgumentParser(description="What a GPU is to show.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=120, help="time limit of a part")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--part", choices=list(PARTS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.part is None:
        return run_all(arguments)
    run_part(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
