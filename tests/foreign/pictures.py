"""Torchvision and timm: projects that need no package beyond those of the tests."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Generator, Tensor, nn

from tests.foreign.project import CLASSES, GIVE_LOSSES, ONLY_TRAINS, OTHERS, Project, Task, loader

IMAGE = 32


def image(g: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(3, IMAGE, IMAGE, generator=g), torch.randint(CLASSES, (), generator=g)


def resnet_18() -> LightningModule:
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


def mixup(always: bool) -> Callable[[], LightningModule]:
    def step(module: Any, batch: Any) -> Tensor:
        x, y = mix(*batch) if always or module.training else batch
        return F.cross_entropy(module(x), y)

    return lambda: Task(timm_network(), step)


def mixup_losses(module: Any, batch: Any) -> Tensor:
    x, y = mix(*batch) if module.training else (batch[0], F.one_hot(batch[1], CLASSES))
    return -(y * module(x).log_softmax(1)).sum(1)


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

    def step(module: Any, b: Any) -> Tensor:
        return sigmoid_focal_loss(module(b[0]), F.one_hot(b[1], CLASSES).float(), reduction="mean")

    return Task(nn.Sequential(nn.Flatten(), nn.Linear(3 * IMAGE * IMAGE, CLASSES)), step)


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


IMAGES, MIX_TRAINING, MIX_ALWAYS = loader(image), mixup(always=False), mixup(always=True)
BINARY, SOFT = timm_recipe("BinaryCrossEntropy"), timm_recipe("SoftTargetCrossEntropy")
IN_TRAINING = "test_resnet, mixup in training, cross_entropy of soft targets"

PROJECTS = [
    Project("torchvision", "ResNet-18, cross_entropy with label smoothing", resnet_18, IMAGES, smoothed_losses),
    Project("timm", IN_TRAINING, MIX_TRAINING, IMAGES, mixup_losses),
    Project("timm", "test_resnet, Mixup, BinaryCrossEntropy", BINARY, IMAGES, mixed_binary_losses),
    Project("timm", "test_resnet, Mixup, SoftTargetCrossEntropy", SOFT, IMAGES, refused=GIVE_LOSSES),
    Project(
        "timm",
        "test_resnet, SoftTargetCrossEntropy as sample_losses",
        SOFT,
        IMAGES,
        hard_losses,
        sample_losses=soft_target_losses,
    ),
    Project("timm", "test_resnet, mixup in evaluation, too", MIX_ALWAYS, IMAGES, refused=OTHERS),
    Project("torch", "a network with other outputs in evaluation mode", only_trains, IMAGES, refused=ONLY_TRAINS),
    Project("torchvision", "sigmoid_focal_loss", focal, IMAGES, scored_focal_losses),
    Project(
        "torchvision",
        "sigmoid_focal_loss as sample_losses",
        focal,
        IMAGES,
        focal_losses,
        sample_losses=own_focal_losses,
    ),
]
