"""The page of a run: what it needs is gathered during the fit, and drawn at the end.

In: weights, measures, samples. Out: `report.safetensors`, `report.html`, and of texts `text_issues.csv`.
Next: `report/page/evidence.py`.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from flow_lightning.contract import data_contract, image_settings, module_contract
from flow_lightning.distributed import on_rank_zero
from flow_lightning.lightning_internals import isolate_rng
from flow_lightning.measures.base import check_at_least
from flow_lightning.measures.images import PretrainedImages
from flow_lightning.measures.outcomes import Outcomes, StepOutcomes
from flow_lightning.report.label_issues import check_no_edits
from flow_lightning.report.page.evidence import Evidence, describe
from flow_lightning.report.page.files import sample_means
from flow_lightning.report.texts import TEXT_ISSUES_FILE, has_tokens, look_at_texts, source_ranks, write_text_issues
from flow_lightning.run import RunCallback, files_written
from flow_lightning.scoring.fingerprint import targets_of

#: Most rows of the curve of training; then every second one goes.
_ROWS = 1000


class ReportCallback(RunCallback):
    """Write `report.html`: one page of the run that needs no server and no network.

    It holds what was learned and forgotten, losses and weights, and the hardest and easiest training samples as
    pictures or texts. It also shows suspected label errors of `label_issues.csv`, changed answers, and curves. What
    the page needs is gathered during the fit, in `report.safetensors`. `flow-lightning report DIRECTORY` draws the page
    again from the files alone, also that of a killed run.

    The callback may stand anywhere in the list. It runs the model on the shown samples, before and after training.

    Args:
        samples: How many of the hardest and of the easiest samples are shown; of each class at least one is.

    Raises:
        ValueError: If `samples` is below 1.
    """

    def __init__(self, *, samples: int = 24) -> None:
        check_at_least(1, samples=samples)
        self.samples = samples
        self.evidence = Evidence()
        self._right: Tensor | None = None  # probabilities that answers belong to their prompts

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.evidence, self._seconds, self._right = Evidence(), 0.0, None
            if (folder := self.run.directory) is not None:
                on_rank_zero(trainer, lambda: check_no_edits(folder / TEXT_ISSUES_FILE))
            self._every, self._last = max(1, trainer.log_every_n_steps), -1  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather labels, pictures and texts, and what the pre-trained model answers."""
        started = time.perf_counter()
        with isolate_rng():
            self._gather(trainer, pl_module)
            if not self.run.resumed:
                with module_contract(pl_module).frozen_reference():
                    self._answer(trainer, pl_module, "before")
        self._save(trainer)
        self._seconds = time.perf_counter() - started

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss every `log_every_n_steps` steps."""
        step, loss = trainer.global_step, outputs.get("loss") if isinstance(outputs, dict) else outputs
        if step % self._every or step == self._last or not isinstance(loss, Tensor):
            return
        self._last = step
        self.evidence.curve.append({"step": step, "loss": float(loss)})
        if len(self.evidence.curve) > _ROWS:
            self.evidence.curve, self._every = self.evidence.curve[1::2], 2 * self._every

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down what is there, for a run that is killed later."""
        self._save(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the fine-tuned model answers, and draw the page, after every measure."""
        started = time.perf_counter()
        with isolate_rng():
            if trainer.max_epochs == 0:  # a fit that only scores never starts to train
                self._gather(trainer, pl_module)
            self._answer(trainer, pl_module, "after" if trainer.max_epochs else "before")
            self._compare(trainer, pl_module)
        self._save(trainer)
        self.run.record(trainer, {"time/report_s": self._seconds + time.perf_counter() - started})
        if (folder := self.run.directory) is not None:
            from flow_lightning.report.loggers import log_page  # matplotlib is slow to import
            from flow_lightning.report.page.render import write_page

            on_rank_zero(trainer, lambda: log_page(trainer.loggers, write_page(folder)))
            rank_zero_info(f"Files in {files_written(folder)}")

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit cannot find out again: the curve, and the first answers."""
        before = {index: sample["before"] for index, sample in self.evidence.shown.items() if "before" in sample}
        return {"curve": self.evidence.curve, "before": before, "every": self._every, "right": self._right}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an earlier fit noted."""
        self.evidence.curve, self._every = state_dict["curve"], state_dict["every"]
        self._right = state_dict.get("right")
        for index, answer in state_dict["before"].items():
            self.evidence.shown[index] = {"before": answer}

    def _save(self, trainer: Trainer) -> None:
        if (folder := self.run.directory) is not None:
            for measure in self.run.measures:
                for when, chosen in (measure.answers or {}).items():
                    self.evidence.tensors[f"{measure.part}/{when}"] = chosen
            on_rank_zero(trainer, lambda: self.evidence.save(folder))

    def _gather(self, trainer: Trainer, module: LightningModule) -> None:
        """Choose the samples to show, and keep what there is to see of them."""
        contract, data, evidence = module_contract(module), data_contract(trainer), self.evidence
        dataset, count = self.run.scoring.samples.loader.dataset, len(self.run.scoring.samples)
        if data.class_names:
            evidence.words["class_names"] = list(data.class_names)
        weights = contract.sample_weights
        losses = None if weights is None else sample_means(weights)[0].cpu()
        labels = None if contract.tokenizer is not None else _integers(targets_of(dataset), count)
        if labels is not None:
            evidence.tensors["labels"] = labels
        if contract.tokenizer is not None and has_tokens(dataset):
            if not self.run.resumed:
                self._right = self.run.scoring.beside("right")
            found, words = look_at_texts(dataset, contract.tokenizer, self._right)
            evidence.tensors |= found
            evidence.words |= words
            self._note_sources(data.sample_sources, count)
            if (folder := self.run.directory) is not None:
                table = partial(write_text_issues, folder / TEXT_ISSUES_FILE, found, words, losses, data.sample_sources)
                on_rank_zero(trainer, table)
        config = image_settings(trainer, module)
        for index in choose(losses, labels, self.samples):
            seen = evidence.shown.setdefault(str(index), {})
            try:
                seen.update(describe(dataset[index], contract.tokenizer, config.get("mean"), config.get("std")))
            except OSError as error:  # the page says so
                seen["note"] = f"cannot be read: {error}"

    def _note_sources(self, sources: Sequence[str] | None, count: int) -> None:
        """Keep where each text comes from."""
        if sources is None:
            return
        if len(sources) != count:
            raise ValueError(
                f"sample_sources of the data module has {len(sources)} values, but there are {count} training samples. "
                "Give one for each, in their order."
            )
        self.evidence.tensors["text/source"], self.evidence.words["sources"] = source_ranks(sources)

    def _answer(self, trainer: Trainer, module: LightningModule, when: str) -> None:
        """Note class and probability that the model gives the shown samples."""
        contract, shown = module_contract(module), self.evidence.shown
        outcomes: Outcomes = ShownOutcomes() if contract.pretrained_task is not None else StepOutcomes()
        positions = sorted(map(int, shown))
        if not positions or contract.tokenizer is not None:
            return
        outcomes.take(self.run.scoring.samples.loader)
        try:
            classes, *probabilities = outcomes(trainer, module, positions, f"Report {when}")
        except (TypeError, AttributeError) as error:  # no classes, as in regression
            self.evidence.words["note"] = f"The model's answers are not known: {error}"
            return
        columns = [classes.tolist(), *(values.tolist() for values in probabilities)]
        for position, *answer in zip(positions, *columns):
            shown[str(position)][when] = answer

    def _compare(self, trainer: Trainer, module: LightningModule) -> None:
        """Keep pictures of retention samples that the model got right, or answered otherwise, before training."""
        measure = next((each for each in self.run.measures if isinstance(each, PretrainedImages)), None)
        if measure is None or not {"before", "after"} <= (measure.answers or {}).keys():
            return
        answers: dict[str, Tensor] = measure.answers or {}
        head, lost = module_contract(module).pretrained_head, lost_samples(answers)[: self.samples].tolist()
        if head is not None and head.out_features == 1000:
            from timm.data.imagenet_info import ImageNetInfo

            names = ImageNetInfo().label_descriptions()
            self.evidence.words["pretrained_names"] = [name.partition(",")[0] for name in names]
        config = image_settings(trainer, module)
        dataset: Any = measure.loader.dataset
        self.evidence.lost = [
            {"index": index, **{when: int(chosen[index]) for when, chosen in answers.items()}}
            | describe(dataset[index], None, config.get("mean"), config.get("std"))
            for index in lost
        ]


class ShownOutcomes(Outcomes):
    """The class that an image classifier chooses and its probability, `[B]` each."""

    def of_batch(self, module: LightningModule, batch: Any) -> tuple[Tensor, ...]:
        """See the class."""
        largest = module(batch["image"]).float().softmax(dim=1).max(dim=1)
        return largest.indices, largest.values


def choose(losses: Tensor | None, labels: Tensor | None, most: int) -> list[int]:
    """Return the indices of samples to show: hardest and easiest, overall and of each class.

    >>> choose(torch.tensor([0.1, 3.0, 0.2, 0.5]), torch.tensor([0, 0, 1, 1]), 1)
    [0, 1, 2, 3]
    """
    if losses is None:
        return []
    order = losses.argsort(stable=True)
    chosen = set(order[:most].tolist()) | set(order[-most:].tolist())
    if labels is not None:
        classes = labels.unique().tolist()
        for each in classes[: 5 * most]:
            own = order[labels[order] == each]
            some = max(1, most // len(classes))
            chosen |= set(own[:some].tolist()) | set(own[-some:].tolist())
    return sorted(chosen)


def lost_samples(answers: dict[str, Tensor]) -> Tensor:
    """Return the positions of samples that were right before and no longer are; without labels, changed ones."""
    changed = answers["before"] != answers["after"]
    return (changed & (answers["before"] == answers["given"]) if "given" in answers else changed).nonzero().flatten()


def _integers(targets: Sequence[Any] | None, count: int) -> Tensor | None:
    """Return targets as class indices `[n]`; None if they are something else."""
    if targets is None or len(targets) != count:
        return None
    labels = torch.as_tensor(targets)
    return None if labels.is_floating_point() or labels.ndim != 1 else labels.int()
