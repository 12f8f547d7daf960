"""One fit in a process of its own, for launchers: `python -m tests.fit_in_process '{"max_epochs": 2}'`.

Runs in the current folder and writes what it found into `found<rank>.pt`.
"""

import json
import sys
from pathlib import Path

import torch

import flow_lightning as fl
from tests.examples import LinearRegression, RegressionData, fit, regression_data


class Record(fl.FlowWeightingCallback):
    """Writes down the weights that each rank trains with, and how many samples it has scored."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        found = {"scored": pl_module.scored, "weights": self.weights.weights, "losses": self.weights.losses}
        torch.save(found, Path(self.where) / f"found{trainer.global_rank}.pt")


def run(where: str = ".", samples: int = 23, **settings) -> None:
    callback = Record()
    callback.where = where
    settings = {"default_root_dir": str(Path(where) / "run")} | settings
    fit(callback, module=LinearRegression(), data=RegressionData(regression_data(samples)), **settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(**json.loads(sys.argv[1]))
