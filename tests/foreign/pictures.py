"""Torchvision and timm: projects that need no package beyond those of the tests."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Generator, Tensor, nn

from tests.foreign.project import CLASSES, Project, Task, loader

IMAGE = 32


def image(g: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(3, IMAGE, IMAGE, generator=g), torch.randint(CLASSES, (), generator=g)


def torchvision_reference() -> LightningModule:
    import torchvision

    network = torchvision.models.resnet18(num_classes=CLASSES)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    return Task(network, lambda module, batch: criterion(module(batch[0]), batch[1]))


def smoothed_losses(module: Any, batch: Any) -> Tensor:
    log_probs = module(batch[0]).log_softmax(1)
    own = log_probs.gather(1, batch[1][:, None]).squeeze(1)
    return -0.9 * own - 0.1 * log_probs.mean(1)


def timm_network() -> nn.Module:
    import timm

    return timm.create_model("test_resnet", pretrained=False, num_classes=CLASSES)


def mix(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mix each image and its label with those of another sample."""
    share, other = torch.rand(()), torch.randperm(len(x))
    y = F.one_hot(y, CLASSES).float()
    return share * x + (1 - share) * x[other], share * y + (1 - share) * y[other]


def mixup_in_training() -> LightningModule:
    def step(module: Any, batch: Any) -> Tensor:
        x, y = mix(*batch) if module.training else batch
        return F.cross_entropy(module(x), y)

    return Task(timm_network(), step)


def mixup_losses(module: Any, batch: Any) -> Tensor:
    if not module.training:
        return -module(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).squeeze(1)
    x, y = mix(*batch)
    return -(y * module(x).log_softmax(1)).sum(1)


def mixup_always() -> LightningModule:
    def step(module: Any, batch: Any) -> Tensor:
        x, y = mix(*batch)
        return F.cross_entropy(module(x), y)

    return Task(timm_network(), step)


def timm_mixup() -> Any:
    import timm.data

    return timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)


def mixed_binary_losses(module: Any, batch: Any) -> Tensor:
    x, y = timm_mixup()(*batch) if module.training else (batch[0], F.one_hot(batch[1], CLASSES).float())
    p = module(x).sigmoid()
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean(1)


def timm_recipe(loss: str) -> Callable[[], LightningModule]:
    """Return what makes a module with timm's own Mixup and one of its losses."""

    def make() -> LightningModule:
        import timm.loss

        mixup = timm_mixup()
        criterion = getattr(timm.loss, loss)()

        def step(module: Any, batch: Any) -> Tensor:
            x, y = batch
            if module.training and len(x) % 2 == 0:
                x, y = mixup(x.clone(), y)
            else:
                y = F.one_hot(y, CLASSES).float()
            return criterion(module(x), y)

        return Task(timm_network(), step)

    return make


def soft_target_losses(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return torch.sum(-F.one_hot(y, CLASSES) * F.log_softmax(module(x), dim=-1), dim=-1)


def hard_losses(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def only_trains() -> LightningModule:
    """A network that makes something else in evaluation mode, as detectors do."""

    def step(module: Any, batch: Any) -> Tensor:
        out = module(batch[0])
        return F.cross_entropy(out if module.training else {"classes": out.argmax(1)}, batch[1])

    return Task(timm_network(), step)


def focal() -> Any:
    from torchvision.ops import sigmoid_focal_loss

    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * IMAGE * IMAGE, CLASSES))
    return Task(
        network,
        lambda module, b: sigmoid_focal_loss(module(b[0]), F.one_hot(b[1], CLASSES).float(), reduction="mean"),
    )


def focal_losses(module: Any, batch: Any) -> Tensor:
    factors, losses = focal_parts(module, batch)
    return (factors * losses).mean(1)


def scored_focal_losses(module: Any, batch: Any) -> Tensor:
    factors, losses = focal_parts(module, batch)
    return (factors * losses).sum(1) / (1 if module.training else factors.sum(1)) / (CLASSES if module.training else 1)


def own_focal_losses(module: Any, batch: Any) -> Tensor:
    from torchvision.ops import sigmoid_focal_loss

    return sigmoid_focal_loss(module(batch[0]), F.one_hot(batch[1], CLASSES).float(), reduction="none").mean(1)


def focal_parts(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    p, y = module(batch[0]).sigmoid(), F.one_hot(batch[1], CLASSES)
    p = torch.where(y == 1, p, 1 - p)
    return torch.where(y == 1, 0.25, 0.75) * (1 - p).square(), -p.log()


PROJECTS = [
    Project(
        "torchvision",
        "ResNet-18, cross_entropy with label smoothing",
        torchvision_reference,
        loader(image),
        smoothed_losses,
    ),
    Project(
        "timm",
        "test_resnet, mixup in training, cross_entropy of soft targets",
        mixup_in_training,
        loader(image),
        mixup_losses,
        note="a mixed image has the weight of the sample in its row",
    ),
    Project(
        "timm",
        "test_resnet, Mixup, BinaryCrossEntropy",
        timm_recipe("BinaryCrossEntropy"),
        loader(image),
        mixed_binary_losses,
    ),
    Project(
        "timm",
        "test_resnet, Mixup, SoftTargetCrossEntropy",
        timm_recipe("SoftTargetCrossEntropy"),
        loader(image),
        hard_losses,
        refused="Give the losses yourself",
        note="written in tensor operations, not with a loss of torch",
    ),
    Project(
        "timm",
        "test_resnet, SoftTargetCrossEntropy as sample_losses",
        timm_recipe("SoftTargetCrossEntropy"),
        loader(image),
        hard_losses,
        arguments={"sample_losses": soft_target_losses},
    ),
    Project(
        "timm",
        "test_resnet, mixup in evaluation, too",
        mixup_always,
        loader(image),
        hard_losses,
        refused="depends on the others",
        note="mixup only `if self.training` is one line",
    ),
    Project(
        "torch",
        "a network with other outputs in evaluation mode",
        only_trains,
        loader(image),
        hard_losses,
        refused="fails in evaluation mode",
    ),
    Project(
        "torchvision",
        "sigmoid_focal_loss",
        focal,
        loader(image),
        scored_focal_losses,
        note="scored: the mean of the elements, weighted by their focal factors",
    ),
    Project(
        "torchvision",
        "sigmoid_focal_loss as sample_losses",
        focal,
        loader(image),
        focal_losses,
        arguments={"sample_losses": own_focal_losses},
    ),
]
