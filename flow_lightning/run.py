"""One fit's directory and numbers, shared by the callbacks of that fit.

In: Trainer and module, at `setup`. Out: `metrics.json`, and files beside it. Next: `callbacks/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader

from flow_lightning.contract import data_contract
from flow_lightning.data.edited import edit_numbers
from flow_lightning.distributed import check_strategy, on_rank_zero
from flow_lightning.files import check_writable
from flow_lightning.measures import Measure
from flow_lightning.report.metrics import read_metrics, write_metrics
from flow_lightning.scoring.scoring import Scoring

#: Files and folders of a run that a person looks at, as its last line names them.
_FILES = (
    *("metrics.json", "flow_weights.safetensors", "label_issues.csv", "label_issues.parquet", "text_issues.csv"),
    *("pred_probs.npy", "features.npy", "checkpoints", "model"),
    *("flow_weights.png", "path.png", "retention.png", "report.html"),
)


@dataclass
class Run:
    """What the callbacks of one fit share."""

    directory: Path | None  #: where the run writes; None if it writes nothing (see `run_directory`)
    scoring: Scoring  #: the frozen model over the training set
    resumed: bool = False  #: whether the fit continues from a checkpoint: the model is no longer the pre-trained one
    is_body_moved: bool = False  #: whether training's end moved the body, so that its head is to be solved anew
    metrics: dict[str, Any] = field(default_factory=dict)  #: recorded so far, by their key in `metrics.json`
    measures: list[Measure] = field(default_factory=list)  #: what RetentionCallback measures

    def __deepcopy__(self, memo: dict[int, Any]) -> "Run":
        """Weight averaging copies the module; the copy belongs to the same run."""
        return self

    def record(self, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
        """Add numbers to `metrics.json`, the loggers and `trainer.callback_metrics`; call it on every rank."""
        file = None if self.directory is None else self.directory / "metrics.json"
        if self.resumed and not self.metrics and file is not None and file.exists():
            self.metrics.update(read_metrics(file))
        self.metrics.update(metrics)
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        trainer.callback_metrics.update({key: torch.tensor(float(value)) for key, value in numbers.items()})
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
        if file is not None:
            on_rank_zero(trainer, lambda: write_metrics(file, self.edits(trainer) | self.metrics))

    def edits(self, trainer: Trainer) -> dict[str, int]:
        """Return how many training samples were dropped and relabelled, by the data module or else the loaders."""
        if (numbers := data_contract(trainer).edit_numbers) is not None:
            return numbers
        loaders = trainer.train_dataloader  # None before training starts
        if loaders is None and "samples" in vars(self.scoring):
            loaders = self.scoring.samples.loader
        each = [] if loaders is None else CombinedLoader(loaders).flattened
        return {name: number for loader in each for name, number in edit_numbers(loader).items()}


class RunCallback(Callback):
    """A callback that shares the fit's `Run`; subclasses that override one of these hooks call `super()`."""

    run: Run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the run of this fit, or start it."""
        if stage == "fit":
            shared = getattr(pl_module, "flow_run", None)
            self.run = shared if shared is not None else start_run(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notice a resumed fit. Tuners load a checkpoint of step 0: that is none."""
        if trainer.state.fn == TrainerFn.FITTING:  # `test` and others restore callbacks, too
            self.run.resumed |= checkpoint.get("global_step", 0) > 0

    def check_checkpoint(self, trainer: Trainer, has_state: bool) -> None:
        """Refuse, with a RuntimeError, to resume from a checkpoint that has nothing of this callback."""
        if self.run.resumed and not has_state:
            raise RuntimeError(
                f"The checkpoint {trainer.ckpt_path} was written without {type(self).__name__}, which has to be there "
                "from the first step on. Start the fit from the pre-trained model with it."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the run."""
        vars(pl_module).pop("flow_run", None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the run."""
        vars(pl_module).pop("flow_run", None)


def start_run(trainer: Trainer, module: LightningModule) -> Run:
    """Start the run of a fit, on every rank; a directory that cannot be written to is an OSError before scoring."""
    check_strategy(trainer)
    run = Run(run_directory(trainer), Scoring(trainer, module))
    checkpoints = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    folders = {str(folder or "://") for folder in (run.directory, *checkpoints)}
    on_rank_zero(trainer, lambda: check_writable(*(folder for folder in folders if "://" not in folder)))
    vars(module)["flow_run"] = run
    return run


def run_directory(trainer: Trainer) -> Path | None:
    """Return the directory of a run: the logger's; without a logger `default_root_dir`, if one was set.

    None if the run is to leave no files: in a `fast_dev_run`, and with `logger=False` in the working directory. Call it
    on every rank: rank 0 tells the others.
    """
    logger = trainer.loggers[0] if trainer.loggers else None
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    if logger is None:
        root = Path(trainer.default_root_dir)
        return None if root.absolute() == Path.cwd() else root
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        return Path(trainer.log_dir or trainer.default_root_dir)
    # Other loggers have one folder for all runs; Lightning's checkpoints go to this one in it.
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    place = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version
    return Path(trainer.strategy.broadcast(str(place)))


def files_written(folder: Path) -> str:
    """Name the folder of a run and what is in it, for its last line.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> (folder / "model").mkdir(); (folder / "metrics.json").touch()
    >>> files_written(folder).removeprefix(str(folder))
    ': metrics.json, model/'
    """
    there = (folder / name for name in _FILES if (folder / name).exists())
    return f"{folder}: {', '.join(path.name + '/' * path.is_dir() for path in there)}"
