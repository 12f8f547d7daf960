"""Scoring by two processes against one, each with one thread, in alternation.

python tests/benchmarks/two_processes.py
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import flow_lightning as fl  # noqa: E402
from tests.examples import make_trainer  # noqa: E402
from tests.images import PictureData  # noqa: E402
from tests.processes import launch  # noqa: E402


def score(folder: str, samples: int, size: int, processes: int) -> None:
    torch.set_num_threads(1)
    module = fl.ImageClassificationModule("resnet18", 3, pretrained=False)
    data = PictureData(samples, size, batch_size=32)
    trainer = make_trainer(
        fl.FlowWeightingCallback(temperature=1.0),
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=0,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data)


def seconds(samples: int, size: int, processes: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        launch(score, folder, samples, size, processes, processes=processes)
        return json.loads((Path(folder) / "metrics.json").read_text())["time/scoring_s"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1600)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    ratios = []
    for i in range(args.rounds):
        order = (1, 2) if i % 2 else (2, 1)
        found = {processes: seconds(args.samples, args.size, processes) for processes in order}
        ratios.append(found[2] / found[1])
        print(f"1 process {found[1]:.2f} s, 2 processes {found[2]:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(f"2 processes take {median(ratios):.3f} of the time of 1 ({min(ratios):.3f} to {max(ratios):.3f})")
