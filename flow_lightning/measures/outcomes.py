"""What a model does on each sample that a budget on forgetting watches: right or wrong, its choice, its loss.

In: Trainer, module and positions of samples. Out: outcomes by sample. Next: `method/budget.py`, which compares them.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from flow_lightning.contract import module_contract
from flow_lightning.data.indexing import IndexedDataset
from flow_lightning.measures.base import Measure
from flow_lightning.measures.images import PretrainedImages, target_outcomes, top_k_correct
from flow_lightning.measures.text import GeneralText, token_sums_and_counts
from flow_lightning.method.losses import IGNORED, choices
from flow_lightning.method.weights import SampleWeights
from flow_lightning.scoring.samples import Samples, cut_batches, read_once
from flow_lightning.scoring.score import BatchFunction, by_index, score_blocks
from flow_lightning.scoring.step_kinds import StepLosses

#: Tokens of a window of text: short ones, so that there are many.
_WINDOW = 256
#: Samples on which the target is measured at most.
_TARGET_SAMPLES = 250


class Outcomes(ABC):
    """Outcomes of a model on the samples of one loader."""

    loader: DataLoader[Any]
    groups: Sequence[Hashable]  #: what each sample was taken from: samples of one photograph are not independent

    def prepare(self, trainer: Trainer, module: LightningModule, samples: Samples) -> None:
        """Find the data, by default the samples of the training; refuse a module that they do not fit."""
        self.take(samples.loader)

    def take(self, loader: DataLoader[Any], dataset: Any = None, groups: Sequence[Hashable] | None = None) -> None:
        """Take the samples of a loader, or of a data set in its place; without workers each is read once."""
        dataset = loader.dataset if dataset is None else dataset
        self._size = len(cut_batches(loader)[0])
        self.groups = range(len(dataset)) if groups is None else groups
        self.loader = read_once(loader, dataset)

    def before(self, trainer: Trainer, module: LightningModule, parts: Sequence[list[int]]) -> list[Tensor]:
        """Return the outcomes of the pre-trained model on parts of the samples, if RetentionCallback asks for them."""
        return []

    @abstractmethod
    def of_batch(self, module: LightningModule, batch: Any) -> tuple[Tensor, ...]:
        """Return the outcomes of a batch: tensors `[B]` or `[B, ...]`."""

    def context(self, trainer: Trainer, module: LightningModule) -> AbstractContextManager[Any]:
        """Return the context in which batches are scored."""
        return nullcontext()

    def __call__(
        self, trainer: Trainer, module: LightningModule, positions: Sequence[int], description: str
    ) -> tuple[Tensor, ...]:
        """Return the outcomes of the samples at these positions, in their order, the same on every rank."""
        function: BatchFunction = partial(self.of_batch, module)
        with self.context(trainer, module):
            batches = [positions[start : start + self._size] for start in range(0, len(positions), self._size)]
            blocks = score_blocks(trainer, module, self.loader, batches, function, description)
            outcomes = by_index(blocks, len(self.loader.dataset))  # type: ignore[arg-type]
        return tuple(values[torch.as_tensor(positions)] for values in outcomes)


class ImageOutcomes(Outcomes):
    """Answers with the pre-trained head: whether they are right, `[B]`, or the class itself.

    For `accuracy`, which needs labels, or `agreement`; `source` is None for the inputs of the training.
    """

    def __init__(self, of: str, source: PretrainedImages | None) -> None:
        self.of, self.source = of, source

    def prepare(self, trainer: Trainer, module: LightningModule, samples: Samples) -> None:
        """Open the images; a ValueError if accuracy is asked for and they have no labels."""
        if (source := self.source) is None:
            return super().prepare(trainer, module, samples)
        source.prepare(trainer, module)
        if self.of == "accuracy" and not source.labelled:
            raise ValueError(
                f"The images {source.images} have no labels, so a budget cannot be on accuracy. Set of='agreement'."
            )
        images: Any = source.loader.dataset
        self.take(source.loader, groups=[view.file for view in images.views])

    def before(self, trainer: Trainer, module: LightningModule, parts: Sequence[list[int]]) -> list[Tensor]:
        """Return them if the parts are all images: found once in a fit, whoever asks first."""
        if (source := self.source) is None or sum(map(len, parts)) < len(self.groups):
            return []
        found = source.before(trainer, module, "budget", self.loader)
        outcomes = found[0 if self.of == "accuracy" else 2] if source.labelled else choices(found[0])
        return [outcomes[torch.as_tensor(part)] for part in parts]

    def context(self, trainer: Trainer, module: Any) -> AbstractContextManager[Any]:
        """Put the pre-trained head back."""
        return module.pretrained_task()  # type: ignore[no-any-return]

    def of_batch(self, module: LightningModule, batch: Any) -> tuple[Tensor, ...]:
        """See the class."""
        logits = module(batch["image"]).float()
        return (top_k_correct(logits, batch["target"]).float() if self.of == "accuracy" else choices(logits),)


class TextOutcomes(Outcomes):
    """Sum of the token losses and number of tokens of each window of text, `[B]` and `[B]`.

    For `agreement` the most likely token at each position, `[B, T]`; -1 behind the end of a shorter window.
    """

    def __init__(self, of: str, source: GeneralText) -> None:
        self.of, self.source = of, source

    def prepare(self, trainer: Trainer, module: LightningModule, samples: Samples) -> None:
        """Read the texts and cut them into windows."""
        self.source.prepare(trainer, module)
        self.take(self.source.loader)
        windows: Any = self.source.loader.dataset
        self._width = int(windows.lengths.max()) - 1

    def of_batch(self, module: Any, batch: Any) -> tuple[Tensor, ...]:
        """See the class."""
        if self.of == "perplexity":
            return token_sums_and_counts(module, batch)
        is_asked = F.pad(batch["labels"][:, 1:] != IGNORED, (0, self._width + 1 - batch["labels"].shape[1]))
        tokens = torch.full_like(is_asked, -1, dtype=torch.int32)
        tokens[is_asked] = module.top_tokens(batch).int()
        return (tokens,)


class StepOutcomes(Outcomes):
    """The class with the largest logit in the cross-entropy of an unchanged module's `training_step`, `[B]`."""

    def __init__(self) -> None:
        self.kind = StepLosses("cross_entropy")

    def context(self, trainer: Trainer, module: LightningModule) -> AbstractContextManager[Any]:
        """Let steps run without a trace."""
        return self.kind.context(trainer, module)

    def of_batch(self, module: LightningModule, batch: Any) -> tuple[Tensor, ...]:
        """See the class; a TypeError if no cross-entropy has one row of logits for each sample."""
        size = len(vars(module)["batch_samples"])
        _, interception = self.kind.step(module, batch, size)
        for term in interception.terms:
            if term.name == "cross_entropy" and term.input.shape[:1] == (size,) and term.input.ndim == 2:
                return (choices(term.input.detach().float()),)
        raise TypeError(
            f"{type(module).__name__} has no pretrained_task(), and in its training_step no cross-entropy has one row "
            "of logits for each sample, so its answers are not known. Give the budget texts and of='perplexity', or "
            "the module a pretrained_task()."
        )


class TargetOutcomes(Outcomes):
    """Losses of the target task, `[B]`; on the validation set of an image classifier also right answers, `[B]`.

    Without such a set they are those of training samples, with their weights. The fit has seen these: their loss tells
    how far it has come, not how well it generalises.
    """

    is_held_out: bool  #: whether the samples are those of the validation set
    positions: list[int]  #: of the samples that are measured

    def prepare(self, trainer: Trainer, module: LightningModule, samples: Samples) -> None:
        """Choose the samples."""
        contract, validation = module_contract(module), cast(Any, trainer.val_dataloaders)
        is_classifier = contract.pretrained_task is not None and contract.data_config is not None
        self.is_held_out = is_classifier and isinstance(validation, DataLoader)
        self.kind = None if contract.sample_losses is not None else StepLosses()
        if self.is_held_out:
            self.take(validation, IndexedDataset(validation.dataset))
        else:
            self.take(samples.loader)
        self.positions = sorted(chain(*halves(self.groups, _TARGET_SAMPLES // 2)))

    def context(self, trainer: Trainer, module: LightningModule) -> AbstractContextManager[Any]:
        """Let steps of an unchanged module run without a trace."""
        return nullcontext() if self.kind is None else self.kind.context(trainer, module)

    def of_batch(self, module: Any, batch: Any) -> tuple[Tensor, ...]:
        """See the class."""
        if self.is_held_out:
            return target_outcomes(module, batch)[:2]
        return (module.sample_losses(batch).float(),) if self.kind is None else self.kind.values(module, batch)

    def measure(self, trainer: Trainer, module: LightningModule, description: str) -> dict[str, float]:
        """Return the mean loss, `target_loss`, and of held-out samples the accuracy, `target_top1`."""
        values = self(trainer, module, self.positions, description)
        weights: Any = module_contract(module).sample_weights
        shares = torch.ones(len(self.positions))
        if not self.is_held_out and isinstance(weights, SampleWeights):
            shares = weights.weights.cpu()[torch.as_tensor(self.positions)]
        means = [float((shares * value).sum() / shares.sum()) for value in values]
        return dict(zip(("target_loss", "target_top1"), means))


def watched(of: str, data: str | Sequence[str] | Measure | None, module: LightningModule) -> Outcomes:
    """Return what a budget watches: see `RetentionBudgetCallback`; a TypeError if the data are of another kind."""
    contract = module_contract(module)
    is_text = of == "perplexity" or (of == "agreement" and contract.top_tokens is not None)
    if is_text and data is not None and not isinstance(data, Measure):
        data = GeneralText([data] if isinstance(data, str) else list(data), window=_WINDOW)
    elif isinstance(data, str):
        data = PretrainedImages(data)
    kind = GeneralText if is_text else PretrainedImages
    if not isinstance(data, kind) and (is_text or data is not None):
        wanted = "text files or a GeneralText" if is_text else "a folder of images or a PretrainedImages"
        raise TypeError(f"data is {data!r}. For {type(module).__name__} and of={of!r}, give {wanted}.")
    if isinstance(data, GeneralText):
        return TextOutcomes(of, data)
    if data is not None or contract.pretrained_head is not None:
        return ImageOutcomes(of, data)
    return StepOutcomes()


def halves(groups: Sequence[Hashable], most: int) -> tuple[list[int], list[int]]:
    """Divide samples at random into two halves of at most `most`, the same in every run; no group is in both.

    >>> [len(half) for half in halves(["a", "a", "b", "b", "c", "d"], 9)]
    [3, 3]
    """
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    parts, order = list(members.values()), torch.randperm(len(members), generator=torch.Generator().manual_seed(0))
    both: tuple[list[int], list[int]] = [], []
    for number in order.tolist():
        if min(map(len, both)) < most:
            min(both, key=len).extend(parts[number])
    return sorted(both[0][:most]), sorted(both[1][:most])
