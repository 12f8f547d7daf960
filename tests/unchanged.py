"""Projects that know nothing of this library: modules with a training_step, and what their losses are by hand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.examples import make_trainer

CLASSES, TOKENS = 3, 5
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0])
#: A loss of (logits, targets), as a training_step has it.
Loss = Callable[[Tensor, Tensor], Tensor]


class Classifier(LightningModule):
    """A network, a loss of its outputs, and what users have beside: dropout, BatchNorm, logs, a list, a metric."""

    def __init__(self, loss: Loss = F.cross_entropy, outputs: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, outputs))
        self.loss = loss
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(self.net(x), y)
        self.log("train/loss", loss)
        self.seen.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Case(NamedTuple):
    """A loss of a training_step, beside the losses `[B]` and the weighted loss that it stands for, by hand."""

    loss: Loss
    losses: Loss
    targets: Callable[[int], Tensor] = lambda n: torch.randint(CLASSES, (n,))
    outputs: int = CLASSES
    weighted: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  #: of (logits, targets, weights)


def _tokens(n: int) -> Tensor:
    targets = torch.randint(CLASSES, (n, TOKENS))
    targets[torch.rand(n, TOKENS) < 0.3] = -100
    targets[:, 0] = 0  # at least one
    return targets


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.view(len(targets), TOKENS, CLASSES).transpose(1, 2)
    return F.cross_entropy(logits, targets, reduction="none")


def _token_mean(logits: Tensor, targets: Tensor) -> Tensor:
    return _token_losses(logits, targets).sum(1) / (targets != -100).sum(1)


def _token_weighted(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return (weights[:, None] * _token_losses(logits, targets)).sum() / (targets != -100).sum()


def _masked(logits: Tensor, targets: Tensor) -> Tensor:
    mask = targets != -100
    return (_token_losses(logits, targets) * mask).sum() / mask.sum()


def _class_weighted(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    own = CLASS_WEIGHTS[targets]
    return (weights * own * _by_sample(logits, targets)).sum() / own.sum()


def _by_sample(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _one_hot(logits: Tensor, targets: Tensor) -> Tensor:
    return F.one_hot(targets, CLASSES).float()


def _binary(n: int) -> Tensor:
    return torch.randint(2, (n, CLASSES)).float()


def _numbers(n: int) -> Tensor:
    return torch.randn(n, CLASSES)


def _both(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets) + 0.5 * F.mse_loss(logits.softmax(1), _one_hot(logits, targets))


def _both_losses(logits: Tensor, targets: Tensor) -> Tensor:
    squares = (logits.softmax(1) - _one_hot(logits, targets)).square().mean(1)
    return _by_sample(logits, targets) + 0.5 * squares


def _ctc(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    log_probs = logits.view(len(targets), TOKENS, CLASSES).log_softmax(2).transpose(0, 1)
    lengths = torch.full((len(targets),), TOKENS)
    return F.ctc_loss(log_probs, targets, lengths, 1 + targets[:, 0] % 2, reduction=reduction)


CASES = {
    "cross_entropy": Case(F.cross_entropy, lambda x, y: -x.log_softmax(1)[torch.arange(len(y)), y]),
    "keywords": Case(lambda x, y: F.cross_entropy(target=y, input=x), _by_sample),
    "smoothed": Case(
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda x, y: F.cross_entropy(x, y, reduction="none", label_smoothing=0.1),
    ),
    "class weights": Case(nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), _by_sample, weighted=_class_weighted),
    "soft targets": Case(lambda x, y: F.cross_entropy(x, _one_hot(x, y)), _by_sample),
    "sum": Case(
        lambda x, y: F.cross_entropy(x, y, reduction="sum"),
        _by_sample,
        weighted=lambda x, y, w: (w * _by_sample(x, y)).sum(),
    ),
    "bce": Case(
        lambda x, y: F.binary_cross_entropy(x.sigmoid(), y),
        lambda x, y: F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1),
        _binary,
    ),
    "mse": Case(F.mse_loss, lambda x, y: (x - y).square().mean(1), _numbers),
    "weighted mse": Case(
        lambda x, y: F.mse_loss(x, y, weight=y.sigmoid()),
        lambda x, y: (y.sigmoid() * (x - y).square()).sum(1) / y.sigmoid().sum(1),
        _numbers,
        weighted=lambda x, y, w: (w[:, None] * y.sigmoid() * (x - y).square()).sum() / y.sigmoid().sum(),
    ),
    "kl_div": Case(
        lambda x, y: F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean"),
        lambda x, y: (y.softmax(1) * (y.log_softmax(1) - x.log_softmax(1))).sum(1) / CLASSES,
        _numbers,
        weighted=lambda x, y, w: (w * (y.softmax(1) * (y.log_softmax(1) - x.log_softmax(1))).sum(1)).mean(),
    ),
    "tokens": Case(
        lambda x, y: F.cross_entropy(x.view(-1, CLASSES), y.flatten()),
        _token_mean,
        _tokens,
        CLASSES * TOKENS,
        _token_weighted,
    ),
    "pixels": Case(
        lambda x, y: nn.CrossEntropyLoss()(x.view(len(y), TOKENS, CLASSES).transpose(1, 2), y),
        _token_mean,
        _tokens,
        CLASSES * TOKENS,
        _token_weighted,
    ),
    "a mask of its own": Case(_masked, _token_mean, _tokens, CLASSES * TOKENS, _token_weighted),
    "ctc": Case(
        _ctc,
        lambda x, y: _ctc(x, y, "none") / (1 + y[:, 0] % 2),
        lambda n: torch.randint(1, CLASSES, (n, 2)),
        CLASSES * TOKENS,
    ),
    "two terms": Case(_both, _both_losses),
}


def data(case: Case = CASES["cross_entropy"], n: int = 23) -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(n, 4), case.targets(n))


def weights() -> Tensor:
    """Compute FLOW's weights of the samples of `data` under a fresh Classifier."""
    x, y = data().tensors
    with torch.no_grad():
        losses = F.cross_entropy(Classifier().eval().net(x), y, reduction="none")
    return torch.exp(-losses / losses.quantile(0.5))


def fit(module: LightningModule, dataset: Any, *callbacks: Callback, **settings: Any) -> Trainer:
    own = torch.Generator()  # so that the loader draws nothing from the numbers of dropout
    loader = settings.pop("loader", DataLoader(dataset, batch_size=5, generator=own))
    validation, path = settings.pop("val_dataloaders", None), settings.pop("ckpt_path", None)
    defaults = {"max_epochs": 2, "default_root_dir": ".", "log_every_n_steps": None}
    trainer = make_trainer(*callbacks, **defaults | settings)
    torch.manual_seed(2)
    trainer.fit(module, loader, validation, ckpt_path=path)
    return trainer
