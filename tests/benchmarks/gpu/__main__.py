"""Everything that a GPU is to show, in minutes, without network: correctness first, then speed and memory.

    python -m tests.benchmarks.gpu --out FOLDER [--device cuda] [--seconds 120] [--total 480] [--tiny]

Each part runs in a process of its own with a time limit of its own, and each row is written at once to
`FOLDER/PART.json`; `FOLDER/gpu.md` is the table so far. Parts that are left when the total time is over are not run.
`--tiny` has sizes for a CPU. Models have random parameters.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from flow_lightning.files import write_bytes
from tests.benchmarks.gpu.correctness import correctness
from tests.benchmarks.gpu.language import language
from tests.benchmarks.gpu.processes import processes
from tests.benchmarks.gpu.rows import Row, skipped
from tests.benchmarks.gpu.trainers import trainers, unsloth
from tests.benchmarks.gpu.vision import vision

PARTS = {
    "correctness": correctness,
    "processes": processes,
    "vision": vision,
    "language 135M": language,
    "language 1B": partial(language, geometry="1B"),
    "language 2B": partial(language, geometry="2B"),
    "trainers": trainers,
    "unsloth": unsloth,
}


def write(folder: Path, part: str, rows: list[Row]) -> None:
    """Write the rows of a part: a part that is stopped meanwhile leaves those before."""
    write_bytes(folder / f"{part}.json", json.dumps(rows).encode())


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
    """Run one part here, and write its rows, each as soon as it is known."""
    torch.manual_seed(0)
    rows: list[Row] = []
    for each in PARTS[arguments.part](arguments.device, arguments.tiny):
        rows.append(each)
        write(arguments.out, arguments.part, rows)


def run_all(arguments: argparse.Namespace) -> int:
    """Run each part in a process of its own; return how many failed or came out wrong."""
    failed, end = 0, time.monotonic() + arguments.total
    for name in PARTS:
        (arguments.out / f"{name}.json").unlink(missing_ok=True)  # of an earlier run
    for name in PARTS:
        command = [sys.executable, "-m", "tests.benchmarks.gpu", *sys.argv[1:], "--part", name]
        limit = max(0.0, min(arguments.seconds, end - time.monotonic()))
        try:
            if limit == 0:
                why = "no time was left"
            else:
                code = subprocess.run(command, timeout=limit, check=False, env=_environment(name)).returncode
                why = "it failed" if code else ""
        except subprocess.TimeoutExpired:
            why = f"it took over {limit:.0f} s"
        if why:
            failed += 1
            write(arguments.out, name, [*rows_in(arguments.out, name), skipped("all else", why)])
        (arguments.out / "gpu.md").write_text(table(arguments.out))
    print(table(arguments.out))
    return failed + wrong(arguments.out)


def _environment(part: str) -> dict[str, str]:
    """Return the variables of a part: transformers' Trainer would take all GPUs that it sees."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return os.environ | ({"CUDA_VISIBLE_DEVICES": first} if part in ("trainers", "unsloth") else {})


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
    parser.add_argument("--total", type=float, default=480, help="time limit of all parts")
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
