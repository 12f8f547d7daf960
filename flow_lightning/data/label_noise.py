"""Wrong labels on purpose, to see what a method does with them.

In: right labels. Out: labels of which a share is wrong. Next: `images.py`, `instructions/module.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from flow_lightning.data.sources import LabelledImages
from flow_lightning.method.probe import fit_probe

NoiseKind = Literal["uniform", "class", "instance"]
_THUMBNAIL = 8


@dataclass(frozen=True)
class LabelNoise:
    """Make a share of the labels wrong: exactly `round(rate * n)` of them, the same ones in each run.

    Args:
        rate: The share, in [0, 1).
        kind: `uniform` gives any samples any other class. `class` gives any samples the next class, as where two
            classes are often confused. `instance` takes the samples that a weak model most confuses, and gives them
            its answer. Source: Chen et al., "Beyond class-conditional assumption", AAAI 2021 (arXiv 2012.05458).
        seed: Of the random choices.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> LabelNoise(0.5, "class")(torch.tensor([0, 0, 1, 2]), 3).ne(torch.tensor([0, 0, 1, 2])).sum()
        tensor(2)
    """

    rate: float
    kind: NoiseKind = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"The rate of label noise is {self.rate}; expected a share from 0 to below 1.")
        if self.kind not in get_args(NoiseKind):
            raise ValueError(
                f"The kind of label noise is {self.kind!r}; expected one of {', '.join(get_args(NoiseKind))}."
            )

    def __call__(self, targets: Tensor, classes: int, weak_model: Callable[[], Tensor] | None = None) -> Tensor:
        """Return labels `[n]` with wrong ones among them; `weak_model` gives log-probabilities `[n, C]`."""
        generator, count = torch.Generator().manual_seed(self.seed), round(self.rate * len(targets))
        chosen = torch.randperm(len(targets), generator=generator)[:count]
        others = (targets + torch.randint(1, classes, targets.shape, generator=generator)) % classes
        if self.kind == "class":
            others = (targets + 1) % classes
        elif self.kind == "instance":
            if weak_model is None:
                raise ValueError("Label noise of the kind 'instance' needs a weak model's log-probabilities.")
            scores = weak_model()
            own = scores.gather(1, targets[:, None]).squeeze(1)
            best, others = scores.scatter(1, targets[:, None], -torch.inf).max(1)
            chosen = (best - own).argsort(descending=True, stable=True)[:count]
        return targets.index_put((chosen,), others[chosen])


def with_noise(images: LabelledImages, noise: LabelNoise, classes: int) -> LabelledImages:
    """Return the images with labels of which some are wrong.

    The weak model of `instance` is a linear classifier of grey thumbnails, asked about samples it was not fitted on.
    """
    targets = torch.tensor(images.targets)

    def weak_model() -> Tensor:
        thumbnails = [image.convert("L").resize((_THUMBNAIL, _THUMBNAIL)) for image, _ in images]  # type: ignore[attr-defined]
        features = torch.tensor(np.stack([np.asarray(each, dtype=np.float32).ravel() / 255 for each in thumbnails]))
        folds, result = torch.arange(len(targets)) % 5, torch.empty(len(targets), classes)
        for fold in range(5):
            inside = folds == fold
            fitted = fit_probe(features[~inside], targets[~inside], classes, strengths=(0.01,))
            result[inside] = fitted.head(features[inside]).log_softmax(1)
        return result

    wrong = noise(targets, classes, weak_model).tolist()
    return LabelledImages(((image, label) for (image, _), label in zip(images.samples, wrong)), images.read)


def with_wrong_responses(records: Sequence[Mapping[str, Any]], field: str, noise: LabelNoise) -> list[dict[str, Any]]:
    """Return the records, of which some have the response of another record: `uniform` of any, `class` of the next.

    Raises:
        ValueError: If the kind is `instance`, which needs classes.

    >>> with_wrong_responses([{"q": "1 + 1", "a": "2"}, {"q": "1 + 2", "a": "3"}], "a", LabelNoise(0.5, "class"))[0]
    {'q': '1 + 1', 'a': '3'}
    """
    if noise.kind == "instance":
        raise ValueError("Label noise of the kind 'instance' needs classes. For instructions use uniform or class.")
    if len(records) < 2:
        return [dict(record) for record in records]
    own = torch.arange(len(records))
    source = noise(own, len(records)).tolist()
    return [{**record, field: records[other][field]} for record, other in zip(records, source)]
