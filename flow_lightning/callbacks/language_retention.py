"""What a language model learned and what it kept: instructions, general text and tasks, before and after training."""

import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from flow_lightning.data.instructions import InstructionDataModule, collate
from flow_lightning.data.texts import TextWindows, read_texts
from flow_lightning.measures.images import target_dataloader
from flow_lightning.measures.text import (
    exact_match,
    harness_scores,
    padding_id,
    perplexity,
    split_task,
    target_loss,
)
from flow_lightning.report.record import is_language_model, report
from flow_lightning.run import RunCallback


@dataclass
class LanguageRetentionState:
    """Everything that changes during a fit; the first field goes into checkpoints.

    Attributes:
        before: Metrics from before training.
        target: Loader of the held-out instructions, if there are some.
        texts: Loader of the windows of general text, if there is some.
        resumed: Whether the fit goes on from a checkpoint.
        started: When training began, in seconds of `time.perf_counter`.
    """

    before: dict[str, float] = field(default_factory=dict)
    target: DataLoader[Any] | None = None
    texts: DataLoader[Any] | None = None
    resumed: bool = False
    started: float = 0.0


class LanguageRetentionCallback(RunCallback):
    """Measure a language model before and after training, what it learned and what it kept, and report both.

    Learned: the loss per token of the held-out instructions, and with `answer_tokens` the fraction of its generated
    answers whose final answer is right. Kept: the perplexity of general text and the scores of tasks of the
    lm-evaluation-harness. Writes `metrics.json` and `retention.png` into the run's directory and prints a table;
    `flow_lightning.report.metrics.METRICS` explains every number, and `retention/after/task/<name>` is a task's score.

    Checkpoints carry what was measured before training, so that a resumed fit need not.

    Args:
        texts: General text: UTF-8 files, or the word `packaged` (see `read_texts`). None leaves this part out.
        window: Tokens of general text that the model sees at once; at most as many as it has positions.
        limit_tokens: Tokens of general text; None for all.
        tasks: Tasks or groups of the harness, as `name` or `name:shots`. None leaves this part out.
        tasks_path: Folder with YAML files of tasks of one's own.
        limit_tasks: Samples per task; None for all.
        answer_tokens: Most tokens of a generated answer; None for none.
        batch_size: Sequences per forward pass.
        run_unsafe_code: Whether tasks may run code that the model wrote, as MBPP does. Some also ask for the
            environment variable HF_ALLOW_CODE_EVAL=1.

    Raises:
        ValueError: If a number is out of range, or a task is named twice.
    """

    def __init__(
        self,
        texts: list[str] | None = None,
        window: int = 1024,
        limit_tokens: int | None = None,
        tasks: list[str] | None = None,
        tasks_path: str | None = None,
        limit_tasks: int | None = None,
        answer_tokens: int | None = None,
        batch_size: int = 8,
        run_unsafe_code: bool = False,
    ) -> None:
        super().__init__()
        _check_least("window", window, 2)
        _check_least("limit_tokens", limit_tokens, 2)
        _check_least("limit_tasks", limit_tasks, 1)
        _check_least("answer_tokens", answer_tokens, 1)
        _check_least("batch_size", batch_size, 1)
        _check_tasks(tasks or [])
        self.texts, self.window, self.limit_tokens = texts, window, limit_tokens
        self.tasks, self.tasks_path, self.limit_tasks = tasks, tasks_path, limit_tasks
        self.answer_tokens = answer_tokens
        self.batch_size = batch_size
        self.run_unsafe_code = run_unsafe_code
        self.state = LanguageRetentionState()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit and check the module.

        Raises:
            TypeError: If the module is no language model.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not is_language_model(pl_module):
            raise TypeError(
                f"{type(pl_module).__name__} has no token_losses(batch), so it is no language model. Use "
                "CausalLanguageModule, or RetentionCallback for images."
            )
        self.state = LanguageRetentionState()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Measure the pre-trained model, unless the fit goes on from a checkpoint."""
        started = time.perf_counter()
        with isolate_rng():
            self._find_data(trainer, pl_module)
        if not self.run.resumed:
            with pl_module.frozen_reference():
                self.state.before = self._sizes() | self._measure(trainer, pl_module, "before")
            self.state.before["time/before_s"] = time.perf_counter() - started
        elif self.state.before:
            self._check_resumed()
        else:
            rank_zero_warn(
                f"The checkpoint {trainer.ckpt_path} was written without LanguageRetentionCallback: its model is "
                "fine-tuned already, so nothing can be measured before training. To have it, start the fit from the "
                "pre-trained model with LanguageRetentionCallback."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.state.started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the fine-tuned model and report."""
        started = time.perf_counter()
        metrics = {**self._sizes(), **self.state.before, "time/fit_s": started - self.state.started}
        metrics |= self._measure(trainer, pl_module, "after")
        metrics |= _average(metrics)
        metrics["time/after_s"] = time.perf_counter() - started
        report(trainer, self.run, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured so far: primitives only."""
        return {"before": self.state.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an earlier fit measured."""
        self.state.before = state_dict["before"]

    def _find_data(self, trainer: Trainer, module: Any) -> None:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not (isinstance(datamodule, InstructionDataModule) and datamodule.test is None):
            self.state.target = target_dataloader(trainer, module, self.batch_size)
        if self.state.target is None:
            rank_zero_warn("LanguageRetentionCallback finds no test set, so it measures no target loss.")
        if self.texts is not None:
            self.state.texts = self._text_loader(module)

    def _text_loader(self, module: Any) -> DataLoader[Any]:
        window = min(self.window, module.max_positions or self.window)
        windows = TextWindows(read_texts(self.texts or []), module.tokenizer, window, self.limit_tokens)
        pad = partial(collate, pad_id=padding_id(module.tokenizer))
        return DataLoader(windows, batch_size=self.batch_size, collate_fn=pad)

    def _measure(self, trainer: Trainer, module: Any, when: str) -> dict[str, float]:
        """Measure the model as it is; `when` is "before" or "after" and names the metrics."""
        target = "target/before/" if when == "before" else "target/"
        found: dict[str, float] = {}
        if self.state.target is not None:
            found[target + "loss"] = target_loss(trainer, module, self.state.target, f"Target {when}")
            if self.answer_tokens is not None:
                found[target + "exact_match"] = self._exact_match(trainer, module, when)
        if self.state.texts is not None:
            text = f"General text {when}"
            found[f"retention/{when}/perplexity"] = perplexity(trainer, module, self.state.texts, text)
        return found | self._task_scores(trainer, module, when)

    def _exact_match(self, trainer: Trainer, module: Any, when: str) -> float:
        assert self.state.target is not None and self.answer_tokens is not None
        dataset: Any = self.state.target.dataset
        field = getattr(trainer.datamodule, "response_field", "response")  # type: ignore[attr-defined]
        # The innermost but one: the data module's own, which the loader numbers once more.
        return exact_match(
            trainer, module, dataset.dataset, self.answer_tokens, self.batch_size, field, f"Answers {when}"
        )

    def _task_scores(self, trainer: Trainer, module: Any, when: str) -> dict[str, float]:
        if not self.tasks:
            return {}
        scores = harness_scores(
            trainer, module, self.tasks, self.tasks_path, self.limit_tasks, self.batch_size, self.run_unsafe_code
        )
        mean = {f"retention/{when}/accuracy": statistics.fmean(scores.values())}
        return mean | {f"retention/{when}/task/{name}": score for name, score in scores.items()}

    def _check_resumed(self) -> None:
        """Refuse measurements from other data than those of this fit."""
        for key, size in self._sizes().items():
            if self.state.before.get(key, size) != size:
                raise ValueError(
                    f"{key} is {self.state.before[key]:.0f} in the checkpoint's measurement before training, "
                    f"but {size:.0f} now. Resume with the data of the first fit, or start anew."
                )
        start = "retention/before/task/"
        before = {key.removeprefix(start) for key in self.state.before if key.startswith(start)}
        now = {split_task(entry)[0] for entry in self.tasks or []}
        if before != now:
            raise ValueError(
                f"Before training the tasks {sorted(before)} were measured, but now they are {sorted(now)}. Resume "
                "with the tasks of the first fit, or start anew."
            )

    def _sizes(self) -> dict[str, float]:
        sizes: dict[str, float] = {}
        if self.state.target is not None:
            sizes["target/samples"] = len(self.state.target.dataset)  # type: ignore[arg-type]
        if self.state.texts is not None:
            windows: Any = self.state.texts.dataset
            sizes["retention/tokens"] = int((windows.lengths - 1).sum())
        return sizes


def _check_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name} is {value}; expected at least {least}.")


def _check_tasks(tasks: list[str]) -> None:
    names = [split_task(entry)[0] for entry in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tasks names {twice} more than once; expected each task once, as 'name' or 'name:shots'.")


def _average(metrics: dict[str, float]) -> dict[str, float]:
    """Average target and tasks, where both are there."""
    keys = ("target/exact_match", "retention/after/accuracy")
    return {"average": sum(metrics[key] for key in keys) / 2} if all(key in metrics for key in keys) else {}
