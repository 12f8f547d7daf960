"""Projects on images, of packages that the tests do not need."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from tests.foreign.pictures import IMAGE, hard_losses, image
from tests.foreign.project import (
    CLASSES,
    GIVE_LOSSES,
    ONLY_TRAINS,
    OTHERS,
    QUIET,
    SIZE,
    Project,
    Task,
    fit_elsewhere,
    loader,
    mean_of_all,
    means,
    order,
)


def torchgeo(kind: str, **arguments: Any) -> Callable[[], Any]:
    def make() -> Any:
        import torchgeo.trainers

        return getattr(torchgeo.trainers, kind)(weights=None, in_channels=3, **arguments)

    return make


def scene(*shape: int, name: str = "label", kind: str = "class") -> Any:
    """Return a loader of images with a class, several yes-no labels or numbers, for the whole image or each pixel."""

    def make(g: Generator) -> dict[str, Tensor]:
        number = torch.randn(shape, generator=g)
        label = torch.randint(CLASSES if kind == "class" else 2, shape, generator=g)
        return {"image": image(g)[0], name: number if kind == "number" else label}

    return loader(make)


def label_losses(module: Any, batch: Any) -> Tensor:
    """Return the losses of ClassificationTask."""
    return F.cross_entropy(module(batch["image"]), batch["label"], reduction="none")


def multilabel_losses(module: Any, batch: Any) -> Tensor:
    p, y = module(batch["image"]).sigmoid(), batch["label"]
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean(1)


def pixel_losses(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the losses of all pixels; those of class 0 are ignored."""
    y = batch["mask"]
    return F.cross_entropy(module(batch["image"]), y, reduction="none", ignore_index=0), y != 0


def squared_errors(module: Any, batch: Any) -> Tensor:
    return (module(batch["image"]) - batch["label"]).square().mean(1)


def detection() -> Any:
    def make(g: Generator) -> dict[str, Tensor]:
        box = torch.tensor([[4.0, 4.0, 20.0, 20.0]])
        return {"image": image(g)[0], "bbox_xyxy": box, "label": torch.ones(1, dtype=torch.long)}

    def collate(items: list[dict[str, Tensor]]) -> dict[str, Any]:
        batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
        return {**batch, "image": torch.stack(batch["image"])}

    return loader(make, collate_fn=collate)


def segmentation(loss: str) -> Callable[[], Any]:
    """Return what makes a Unet of segmentation-models-pytorch with one of its losses."""

    def make() -> Any:
        import segmentation_models_pytorch as smp

        network = smp.Unet("resnet18", encoder_weights=None, classes=1)
        criterion = getattr(smp.losses, loss)(*["binary"] * (loss != "SoftBCEWithLogitsLoss"))
        return Task(network, lambda module, b: criterion(module(b["image"]), b["mask"].float()))

    return make


def binary_pixel_losses(module: Any, batch: Any) -> Tensor:
    logits, y = module(batch["image"]), batch["mask"].float()
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean((1, 2, 3))


def image_dice(module: Any, batch: Any) -> Tensor:
    """Return the dice loss of each image."""
    import segmentation_models_pytorch as smp

    criterion = smp.losses.DiceLoss("binary")
    logits, y = module(batch["image"]), batch["mask"]
    return torch.stack([criterion(logits[i : i + 1], y[i : i + 1]) for i in range(len(y))])


def dice_by_hand(module: Any, batch: Any) -> Tensor:
    p, y = module(batch["image"]).sigmoid().flatten(1), batch["mask"].flatten(1)
    return 1 - 2 * (p * y).sum(1) / (p + y).sum(1).clamp_min(1e-7)


def linear_probe() -> Any:
    from lightly.utils.benchmarking import LinearClassifier

    backbone = nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return LinearClassifier(backbone, SIZE, feature_dim=8, num_classes=CLASSES, topk=(1, 2))


def linear_losses(module: Any, batch: Any) -> Tensor:
    module.model.eval()
    return hard_losses(module, batch)


def flat_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * IMAGE * IMAGE, 8))


def simclr() -> Any:
    from lightly.loss import NTXentLoss

    criterion = NTXentLoss()
    return Task(flat_network(), lambda module, b: criterion(module(b[0]), module(b[0] + 0.1)))


def metric_learning() -> Any:
    from pytorch_metric_learning.losses import NTXentLoss

    criterion = NTXentLoss()
    return Task(flat_network(), lambda module, b: criterion(module(b[0]), b[1] % 2))


def monai(loss: str) -> Callable[[], Any]:
    def make() -> Any:
        import monai.losses
        import monai.networks.nets

        network = monai.networks.nets.UNet(2, 3, 1, channels=(4, 8), strides=(2,))
        criterion = getattr(monai.losses, loss)(sigmoid=True)
        return Task(network, lambda module, b: criterion(module(b["image"]), b["mask"].float()))

    return make


def dice_ce_weighted(module: Any, batch: Any, weights: Tensor) -> Tensor:
    from monai.losses import DiceLoss

    dice = DiceLoss(sigmoid=True)(module(batch["image"]), batch["mask"].float())
    return (weights * binary_pixel_losses(module, batch)).mean() + dice


def with_validation(module: Any, batches: Any, callbacks: list[Any]) -> None:
    """Train with a validation loader: the module's scheduler follows the validation loss."""
    Trainer(callbacks=callbacks, **QUIET).fit(module, batches, DataLoader(batches.dataset, SIZE))


def anomaly_loader() -> Any:
    from anomalib.data.dataclasses.torch import ImageBatch, ImageItem

    g = Generator().manual_seed(2)
    items: Any = [ImageItem(image=image(g)[0]) for _ in range(10)]
    return DataLoader(items, SIZE, sampler=order(10), collate_fn=ImageBatch.collate)


def anomaly() -> Any:
    from anomalib.models import Ganomaly

    resize = Ganomaly.configure_pre_processor((IMAGE, IMAGE))
    return Ganomaly(
        n_features=8, latent_vec_size=8, pre_processor=resize, post_processor=False, evaluator=False, visualizer=False
    )


PIXELS, BINARY = scene(IMAGE, IMAGE, name="mask"), scene(1, IMAGE, IMAGE, name="mask", kind="binary")
CLASSIFIER = torchgeo("ClassificationTask", model="resnet18", num_classes=CLASSES)
MULTILABEL = torchgeo("ClassificationTask", model="resnet18", task="multilabel", num_labels=3, loss="bce")
UNET: Any = {"model": "unet", "backbone": "resnet18", "num_classes": CLASSES}
SEGMENTATION = torchgeo("SemanticSegmentationTask", **UNET, ignore_index=0)
JACCARD = torchgeo("SemanticSegmentationTask", **UNET, loss="jaccard")
REGRESSION = torchgeo("RegressionTask", model="resnet18", num_outputs=2)
DETECTION = torchgeo("ObjectDetectionTask", model="faster-rcnn", backbone="resnet18", num_classes=2)
BCE, DICE, FOCAL = segmentation("SoftBCEWithLogitsLoss"), segmentation("DiceLoss"), segmentation("FocalLoss")
GEO = partial(Project, "torchgeo", fit=with_validation)
UNETS = partial(Project, "segmentation-models-pytorch", loader=BINARY)

PROJECTS = [
    GEO("ClassificationTask", CLASSIFIER, scene(), label_losses),
    GEO("ClassificationTask, multilabel", MULTILABEL, scene(3, kind="binary"), multilabel_losses),
    GEO("SemanticSegmentationTask", SEGMENTATION, PIXELS, means(pixel_losses), mean_of_all(pixel_losses)),
    GEO("SemanticSegmentationTask, jaccard", JACCARD, PIXELS, refused=GIVE_LOSSES),
    GEO("RegressionTask", REGRESSION, scene(2, kind="number"), squared_errors),
    GEO("ObjectDetectionTask", DETECTION, detection(), refused=ONLY_TRAINS),
    UNETS("Unet, SoftBCEWithLogitsLoss", BCE, losses=binary_pixel_losses),
    UNETS("Unet, DiceLoss", DICE, refused=GIVE_LOSSES),
    UNETS("Unet, DiceLoss of each image as sample_losses", DICE, losses=dice_by_hand, sample_losses=image_dice),
    UNETS("Unet, FocalLoss", FOCAL, refused=GIVE_LOSSES),
    Project("lightly", "LinearClassifier", linear_probe, loader(image), linear_losses, fit=fit_elsewhere),
    Project("lightly", "NTXentLoss", simclr, loader(image), refused=OTHERS),
    Project("pytorch-metric-learning", "NTXentLoss", metric_learning, loader(image), refused=GIVE_LOSSES),
    Project("monai", "UNet, DiceLoss", monai("DiceLoss"), BINARY, refused=GIVE_LOSSES),
    Project("monai", "UNet, DiceCELoss", monai("DiceCELoss"), BINARY, binary_pixel_losses, dice_ce_weighted),
    Project("anomalib", "Ganomaly", anomaly, anomaly_loader, refused=ONLY_TRAINS),
]
