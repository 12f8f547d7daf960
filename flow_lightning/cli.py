"""The command line: LightningCLI with `score` (weights alone) and `compare` (one configuration, several methods)."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from flow_lightning.callbacks.predictions import PredictionsCallback
from flow_lightning.callbacks.retention import RetentionCallback
from flow_lightning.compare import report_comparison
from flow_lightning.files import write_bytes
from flow_lightning.modules.base import WeightedLossModule
from flow_lightning.modules.image_classification import ImageClassificationModule
from flow_lightning.report.metrics import read_metrics
from flow_lightning.run import run_directory
from flow_lightning.trainer import FlowTrainer


class FlowCLI(LightningCLI):
    """LightningCLI with the retention report, a learning rate for each method, `score` and `compare`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, with the arguments that come from the configuration."""
        parts = {"model", "datamodule"}
        return LightningCLI.subcommands() | {"score": parts, "compare": parts}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `method`, `learning_rate` and `retention`."""
        parser.add_argument("--method", type=str, default="flow", help="Name of the method; picks its learning rate.")
        parser.add_argument(
            "--learning_rate",
            type=float | dict[str, float],
            default=1e-3,
            help="Peak learning rate of the model: one number, or one for each method, {standard: 0.005, flow: 0.001}.",
        )
        parser.link_arguments(("learning_rate", "method"), "model.init_args.learning_rate", compute_fn=learning_rate_of)
        parser.add_lightning_class_args(RetentionCallback, "retention")

    def before_instantiate_classes(self) -> None:
        """Let `validate` validate, where a configuration leaves that out of the fit."""
        trainer = self.config[self.subcommand].trainer if self.subcommand == "validate" else None
        if trainer is not None and trainer.limit_val_batches == 0:
            trainer.limit_val_batches = 1.0

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; `compare` builds them once for each run instead."""
        if self.subcommand != "compare":
            super().instantiate_classes()
            if self.subcommand == "predict" and isinstance(self.model, ImageClassificationModule):
                self.trainer.callbacks.append(PredictionsCallback())  # type: ignore[attr-defined]
            return
        self.config_init = self.config
        self.trainer = self.trainer_class  # type: ignore[assignment]  # read for its methods, never run
        self.model = self.datamodule = None

    def compare(self, methods: list[str], seeds: list[int] | None, output: str, **_: Any) -> None:
        """Run `fit` for each method and seed, then report."""
        folder = Path(output)
        base = folder / "base.yaml"
        config = yaml.safe_load(self.parser.dump(self.config))["compare"]
        shared = {key: value for key, value in config.items() if key not in ("config", "methods", "seeds", "output")}
        write_bytes(base, yaml.safe_dump(shared, sort_keys=False).encode())
        runs: dict[str, list[dict[str, Any]]] = {Path(method).stem: [] for method in methods}
        diverged: list[str] = []
        for seed in seeds or (None,):
            for method in methods:
                name = Path(method).stem
                where = folder / name / ("default" if seed is None else f"seed-{seed}")
                args = ["fit", f"--config={base}", f"--config={method}", f"--trainer.default_root_dir={where}"]
                try:
                    cli = main(args + ([] if seed is None else [f"--seed_everything={seed}"]))
                except FloatingPointError as error:  # the other runs are worth having
                    diverged.append(f"{where}: {error}")
                    runs[name].append({})
                    continue
                metrics = (run_directory(cli.trainer) or Path()) / "metrics.json"
                runs[name].append(read_metrics(metrics) if metrics.exists() else {})  # a run need not measure anything
        if getattr(rank_zero_only, "rank", 0) == 0:  # under ddp every process goes through all runs
            report_comparison(runs, folder)
        if diverged:
            raise FloatingPointError("\n".join(["Runs that diverged, which the table leaves out:", *diverged]))


def learning_rate_of(learning_rate: float | dict[str, float], method: str) -> float:
    """Pick the learning rate of a method.

    Raises:
        ValueError: If rates are given for each method, but none for this one.
    """
    if not isinstance(learning_rate, dict):
        return learning_rate
    if method not in learning_rate:
        raise ValueError(
            f"learning_rate has no rate for the method {method!r}, only for {sorted(learning_rate)}. "
            "Add one, or give a number."
        )
    return learning_rate[method]


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """Run the command line.

    Args:
        args: Arguments, by default the process's own.
    """
    # `compare` calls this function from within, and frozen BatchNorm layers stand in evaluation mode on purpose.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    return FlowCLI(
        WeightedLossModule,
        LightningDataModule,
        trainer_class=FlowTrainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,  # the module has arguments for both
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"description": "flow_lightning: fine-tune without forgetting."},
        args=list(args) if args is not None else None,
    )
