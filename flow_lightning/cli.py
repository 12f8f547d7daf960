"""The command line: LightningCLI with methods, a learning rate for each of them, the retention report and `score`.

In: the words of a command line, with files for names. Out: one run of the Trainer.
Next: `trainer.py`.
"""

import warnings
from inspect import signature
from typing import Any, ClassVar, NoReturn

from lightning import LightningDataModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from flow_lightning.callbacks.flow_weighting import FlowWeightingCallback
from flow_lightning.callbacks.predictions import PredictionsCallback
from flow_lightning.callbacks.retention import RetentionCallback
from flow_lightning.configurations import OptionError, callbacks_of
from flow_lightning.data.images import ImageDataModule
from flow_lightning.modules.base import WeightedLossModule
from flow_lightning.modules.image_classification import ImageClassificationModule
from flow_lightning.option_errors import explain
from flow_lightning.trainer import FlowTrainer

#: Short names of options; and the one name that a model's learning rate has on the command line.
_PARSER_NAMES = {
    "--help-all": "--help",
    "--model.learning_rate": "--learning_rate",
    "--model.init_args.learning_rate": "--learning_rate",
    "--relabel": "--data.edits",
    "--drop-issues": "--data.drop_issues",
}


class FlowParser(LightningArgumentParser):
    """A parser whose errors are short and name the nearest right option."""

    keys: ClassVar[set[str]] = set()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, allow_abbrev=False)  # `--seed` is no `--seed_everything`

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong; a parser of one value raises what its caller expects."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise OptionError(explain(message, self.keys)) from ex


class FlowCLI(LightningCLI):
    """LightningCLI with the retention report, methods, and a learning rate for each method."""

    def __init__(self, words: list[str]) -> None:
        """Parse and run a command line, whose first word is the command."""
        self.command = words[0]
        super().__init__(
            WeightedLossModule,
            LightningDataModule,
            trainer_class=FlowTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # the module has arguments for both
            save_config_kwargs={"overwrite": True},
            parser_class=FlowParser,
            args=[_renamed(word) for word in words],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the given command alone, with what the configuration gives it: to build all parsers takes long."""
        commands = LightningCLI.subcommands() | {"score": {"model", "datamodule"}}
        return {self.command: commands[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `method`, `learning_rate` and `retention`."""
        parser.add_argument("--method", type=str, default="standard", help="How to train; picks the learning rate.")
        parser.add_argument(
            "--learning_rate",
            type=float | dict[str, float] | None,
            help="Peak learning rate of the model: one number, or one for each method, {standard: 0.005, flow: 0.001}. "
            "By default the model's own.",
        )
        parser.add_argument(
            "--board", type=dict[str, Any] | None, help="For `compare`: what it varies. A fit has none."
        )
        parser.link_arguments(
            ("learning_rate", "method", "model"), "model.init_args.learning_rate", compute_fn=learning_rate_of
        )
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")
        parser.add_lightning_class_args(RetentionCallback, "retention")
        FlowParser.keys.update(parser.get_defaults(skip_validation=True).keys())
        FlowParser.keys.update(f"model.{name}" for name in signature(ImageClassificationModule).parameters)
        FlowParser.keys.update(f"data.{name}" for name in signature(ImageDataModule).parameters)

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; a value that one of them refuses is a wrong option."""
        try:
            super().instantiate_classes()
        except (ValueError, OSError, MisconfigurationException) as error:
            self.parser.error(str(error), error)

    def after_instantiate_classes(self) -> None:
        """Say by which method a fit trains, or which model is measured; write the classes that `predict` finds."""
        config = self.config[self.subcommand]
        if self.subcommand == "predict" and isinstance(self.model, ImageClassificationModule):
            self.trainer.callbacks.append(PredictionsCallback())  # type: ignore[attr-defined]
        if self.subcommand == "fit":
            rate = config.model.init_args.get("learning_rate")
            plain = " (plain fine-tuning, without weights)" if config.method == "standard" else ""
            self._check_method(config.method)
            rank_zero_info(f"Method: {config.method}{plain}" + ("." if rate is None else f", learning rate {rate:g}."))
        elif self.subcommand != "score" and config.ckpt_path is None:
            rank_zero_warn(f"{self.subcommand} has no --ckpt_path, so it takes the model as it is before training.")

    def after_validate(self) -> None:
        """Refuse to end in silence where there is nothing to validate on."""
        if not any(self.trainer.num_val_batches):
            raise OptionError(
                "There is no validation set. Set --data.validation_fraction in the fit, too, or use `test`."
            )

    def _check_method(self, method: str) -> None:
        """Check that a shipped method has its callbacks, and that plain training has no weights."""
        found = {type(callback).__name__ for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        if method == "standard" and FlowWeightingCallback.__name__ in found:
            raise OptionError(
                "The method 'standard' trains without weights: give --method flow, or take FlowWeightingCallback out."
            )
        if lost := callbacks_of(method) - found:
            raise OptionError(
                f"The method {method!r} has lost its {min(lost)}: a later configuration replaced the list of "
                "callbacks. Write `callbacks+:` there, which adds to it."
            )


def learning_rate_of(
    learning_rate: float | dict[str, float] | None, method: str, model: dict[str, Any] | None
) -> float | None:
    """Pick the learning rate of a method; where none is given the model keeps its own."""
    if learning_rate is None:
        return (model or {}).get("init_args", {}).get("learning_rate")  # type: ignore[no-any-return]
    if not isinstance(learning_rate, dict):
        return learning_rate
    if method not in learning_rate:
        known = ", ".join(sorted(learning_rate))
        raise ValueError(
            f"learning_rate has no rate for the method {method!r}, only for {known}. Give --learning_rate RATE."
        )
    return learning_rate[method]


def run(words: list[str]) -> FlowCLI:
    """Run one command of the Trainer, with files for names; OptionError if an option is wrong."""
    for message in (
        "LightningCLI's args parameter is intended",  # the parser gets changed arguments
        r"Found \d+ module\(s\) in eval mode at the start of training",  # frozen BatchNorm layers
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own code
    ):
        warnings.filterwarnings("ignore", message=message)
    return FlowCLI(words)


def _renamed(word: str) -> str:
    """Return a word of the command line with the parser's name of its option."""
    name, *value = word.split("=", 1)
    return "=".join([_PARSER_NAMES.get(name, name), *value])
