"""The command line: LightningCLI with names for configurations, methods, and two more commands.

In: the words of a command line. Out: one run of the Trainer; for `compare`, one for each method and seed.
Next: `trainer.py` and `compare.py`.
"""

import sys
import warnings
from collections.abc import Sequence
from inspect import signature
from typing import Any, ClassVar, NoReturn

from lightning import LightningDataModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from flow_lightning.callbacks.flow_weighting import FlowWeightingCallback
from flow_lightning.callbacks.predictions import PredictionsCallback
from flow_lightning.callbacks.retention import RetentionCallback
from flow_lightning.compare import compare
from flow_lightning.configurations import OptionError, method_names, nearest, with_files
from flow_lightning.data.images import ImageDataModule
from flow_lightning.modules.base import WeightedLossModule
from flow_lightning.modules.image_classification import ImageClassificationModule
from flow_lightning.option_errors import explain
from flow_lightning.trainer import FlowTrainer


class FlowParser(LightningArgumentParser):
    """A parser whose errors are short and name the nearest right option."""

    keys: ClassVar[set[str]] = set()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, and exit with status 2; a parser of one value raises, as its caller expects."""
        if not self.exit_on_error:
            super().error(message, ex)
        fail(explain(message, self.keys))


class FlowCLI(LightningCLI):
    """LightningCLI with the retention report, methods, and a learning rate for each method."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the commands, with the arguments that come from the configuration."""
        return LightningCLI.subcommands() | {"score": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `method`, `learning_rate` and `retention`."""
        parser.add_argument("--method", type=str, default="standard", help="How to train; picks the learning rate.")
        parser.add_argument(
            "--learning_rate",
            type=float | dict[str, float] | None,
            help="Peak learning rate of the model: one number, or one for each method, {standard: 0.005, flow: 0.001}. "
            "By default the model's own.",
        )
        parser.link_arguments(
            ("learning_rate", "method", "model"), "model.init_args.learning_rate", compute_fn=learning_rate_of
        )
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.add_lightning_class_args(RetentionCallback, "retention")
        FlowParser.keys.update(parser.get_defaults(skip_validation=True).keys())
        FlowParser.keys.update(f"model.{name}" for name in signature(ImageClassificationModule).parameters)
        FlowParser.keys.update(f"data.{name}" for name in signature(ImageDataModule).parameters)

    def before_instantiate_classes(self) -> None:
        """Say which model is measured; `validate` runs on all batches where a configuration leaves validation out."""
        config = self.config[self.subcommand]
        if self.subcommand in ("validate", "test", "predict") and config.ckpt_path is None:
            rank_zero_warn(f"{self.subcommand} has no --ckpt_path, so it takes the model as it is before training.")
        if self.subcommand == "validate" and config.trainer.limit_val_batches == 0:
            config.trainer.limit_val_batches = 1.0

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; a value that one of them refuses is a wrong option."""
        try:
            super().instantiate_classes()
        except (ValueError, OSError, MisconfigurationException) as error:
            self.parser.error(str(error), error)

    def after_instantiate_classes(self) -> None:
        """Say by which method a fit trains; write the classes that `predict` finds."""
        if self.subcommand == "predict" and isinstance(self.model, ImageClassificationModule):
            self.trainer.callbacks.append(PredictionsCallback())  # type: ignore[attr-defined]
        if self.subcommand == "fit":
            config = self.config["fit"]
            check_method(config.method, self.trainer)
            rank_zero_info(describe_method(config.method, config.model.init_args.get("learning_rate")))


def learning_rate_of(
    learning_rate: float | dict[str, float] | None, method: str, model: dict[str, Any] | None
) -> float | None:
    """Pick the learning rate of a method; where none is given the model keeps its own.

    Raises:
        ValueError: If rates are given for each method, but none for this one.
    """
    if learning_rate is None:
        return (model or {}).get("init_args", {}).get("learning_rate")  # type: ignore[no-any-return]
    if not isinstance(learning_rate, dict):
        return learning_rate
    if method not in learning_rate:
        raise ValueError(
            f"learning_rate has no rate for the method {method!r}, only for {', '.join(sorted(learning_rate))}. "
            "Add one, or give a number."
        )
    return learning_rate[method]


def check_method(method: str, trainer: Trainer) -> None:
    """Check that the samples are weighted if and only if the method says so. Methods of your own may do either.

    Raises:
        OptionError: If not.
    """
    weightings = sum(isinstance(c, FlowWeightingCallback) for c in trainer.callbacks)  # type: ignore[attr-defined]
    if method == "standard" and weightings:
        raise OptionError(
            "The method is 'standard', which trains without weights, but there is a FlowWeightingCallback. "
            "Give --method flow, or take the callback out."
        )
    if method != "standard" and method in method_names() and not weightings:
        raise OptionError(
            f"The method is {method!r}, but there is no FlowWeightingCallback: a later configuration replaced it. "
            "Write `callbacks+:` there, which adds to the list."
        )


def describe_method(method: str, rate: float | None) -> str:
    """Describe in one line how a fit trains."""
    plain = " (plain fine-tuning, without weights; see --method)" if method == "standard" else ""
    return f"Method: {method}{plain}" + ("." if rate is None else f", learning rate {rate:g}.")


def run(arguments: list[str]) -> FlowCLI:
    """Run one command of the Trainer.

    Args:
        arguments: The command and its options, with files for names.
    """
    return FlowCLI(
        WeightedLossModule,
        LightningDataModule,
        trainer_class=FlowTrainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,  # the module has arguments for both
        save_config_kwargs={"overwrite": True},
        parser_class=FlowParser,
        parser_kwargs={"description": "flow_lightning: fine-tune without forgetting."},
        args=arguments,
    )


def main(args: Sequence[str] | None = None) -> FlowCLI | None:
    """Run the command line.

    Args:
        args: Arguments, by default the process's own.

    Returns:
        The `FlowCLI` that ran; None for `compare`, which runs several.
    """
    # The parser gets changed arguments, frozen BatchNorm layers are in evaluation mode on purpose, and the last warning
    # is about Lightning's own code.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode at the start of training")
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    try:
        words = [_renamed(word) for word in with_files(sys.argv[1:] if args is None else args)]
        check_command(words)
        if words[0] != "compare":
            return run(words)
        compare(words[1:], lambda options: run(["fit", *options]).trainer)
        return None
    except OptionError as error:
        fail(str(error))


def check_command(words: Sequence[str]) -> None:
    """Check that a command comes first, and that it has a configuration, or at least a model.

    Raises:
        OptionError: If not.
    """
    known = [*FlowCLI.subcommands(), "compare"]
    if not words or words[0] not in known:
        hint = nearest(words[0], known) if words else ""
        raise OptionError(f"The first word must be a command. {hint}Commands: {', '.join(known)}.")
    if not any(word.startswith(("--config", "--model", "--help")) for word in words):
        raise OptionError(
            f"{words[0]} needs a configuration: flow-lightning {words[0]} -c quickstart. Names: flow-lightning --help"
        )


def fail(message: str) -> NoReturn:
    """Print what is wrong with an option and exit with status 2."""
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def _renamed(word: str) -> str:
    """`--help-all` is the parser's own help; a model's learning rate has one name on the command line."""
    for name in ("--model.learning_rate", "--model.init_args.learning_rate"):
        if word.partition("=")[0] == name:
            return word.replace(name, "--learning_rate", 1)
    return "--help" if word == "--help-all" else word
