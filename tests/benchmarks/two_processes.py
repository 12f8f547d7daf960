"""Scoring by two processes against one, each with one thread, in alternation.

python -m tests.benchmarks.two_processes
"""

import json
import tempfile
from pathlib import Path

from jsonargparse import auto_cli

import flow_lightning as fl
from tests.benchmarks.measure import in_turn, spread
from tests.examples import make_trainer
from tests.images import PictureData
from tests.processes import launch


def score(folder: str, samples: int, size: int, processes: int) -> None:
    module = fl.ImageClassificationModule("resnet18", 3, pretrained=False)
    settings = {"devices": processes, "strategy": "ddp" if processes > 1 else "auto", "default_root_dir": folder}
    trainer = make_trainer(fl.FlowWeightingCallback(temperature=1.0), max_epochs=0, **settings)
    trainer.fit(module, datamodule=PictureData(samples, size, batch_size=32))


def seconds(samples: int, size: int, processes: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        launch(score, folder, samples, size, processes, processes=processes)
        return json.loads((Path(folder) / "metrics.json").read_text())["time/scoring_s"]


def main(samples: int = 1600, size: int = 64, rounds: int = 5) -> None:
    """Time the scoring of random images by one process and by two, in alternation."""
    ratios = []
    for names in in_turn("1", "2", rounds):
        found = {processes: seconds(samples, size, int(processes)) for processes in names}
        ratios.append(found["2"] / found["1"])
        print(f"1 process {found['1']:.2f} s, 2 processes {found['2']:.2f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(f"2 processes take {spread(ratios, 3)} of the time of 1")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
