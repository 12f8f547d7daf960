"""Projects of packages that the tests do not need: each makes its data itself, from random numbers."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from tests.foreign.installed import BERT, CLASSES, IMAGE, Task, hard_losses, image
from tests.foreign.project import QUIET, SIZE, Project, Samples, loader, order


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


def pixel_losses(module: Any, batch: Any) -> Tensor:
    """Return the mean over the pixels of each image that are not of class 0, which is ignored."""
    y = batch["mask"]
    losses = F.cross_entropy(module(batch["image"]), y, reduction="none", ignore_index=0)
    return losses.sum((1, 2)) / (y != 0).sum((1, 2))


def pixel_weighted(module: Any, batch: Any, weights: Tensor) -> Tensor:
    y = batch["mask"]
    losses = F.cross_entropy(module(batch["image"]), y, reduction="none", ignore_index=0)
    return (weights[:, None, None] * losses).sum() / (y != 0).sum()


def detection() -> Any:
    def make(g: Generator) -> dict[str, Tensor]:
        box = torch.tensor([[4.0, 4.0, 20.0, 20.0]])
        return {"image": image(g)[0], "bbox_xyxy": box, "label": torch.ones(1, dtype=torch.long)}

    def collate(items: list[dict[str, Tensor]]) -> dict[str, Any]:
        batch: dict[str, Any] = {name: [item[name] for item in items] for name in items[0]}
        return {**batch, "image": torch.stack(batch["image"])}

    return loader(make, collate_fn=collate)


def segmentation(loss: str, **arguments: Any) -> Callable[[], Any]:
    """Return what makes a Unet of segmentation-models-pytorch with one of its losses."""

    def make() -> Any:
        import segmentation_models_pytorch as smp

        network = smp.Unet("resnet18", encoder_weights=None, classes=1)
        criterion = getattr(smp.losses, loss)(**arguments)
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


def graph_loader() -> Any:
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader as GraphLoader

    g = Generator().manual_seed(2)
    graphs = []
    for _ in range(10):
        n = int(torch.randint(3, 8, (), generator=g))
        x, edges = torch.randn(n, 4, generator=g), torch.randint(n, (2, 3 * n), generator=g)
        nodes = torch.randint(CLASSES, (n,), generator=g)
        graphs.append(Data(x=x, edge_index=edges, y=nodes[:1], nodes=nodes))
    return GraphLoader(graphs, SIZE, sampler=order(10))


def graphs(pooled: bool) -> Callable[[], Any]:
    def make() -> Any:
        from torch_geometric.nn import GIN, global_mean_pool

        def step(module: Any, batch: Any) -> Tensor:
            out = module(batch.x, batch.edge_index)
            return F.cross_entropy(
                global_mean_pool(out, batch.batch) if pooled else out, batch.y if pooled else batch.nodes
            )

        return Task(GIN(4, 8, 2, CLASSES, dropout=0.1), step)

    return make


def graph_losses(module: Any, batch: Any) -> Tensor:
    out = module(batch.x, batch.edge_index)
    means = torch.stack([out[batch.batch == i].mean(0) for i in range(batch.num_graphs)])
    return F.cross_entropy(means, batch.y, reduction="none")


def series_loader() -> Any:
    import numpy as np
    import pandas as pd
    from pytorch_forecasting import TimeSeriesDataSet
    from pytorch_forecasting.data import EncoderNormalizer

    draw = np.random.default_rng(2)
    rows = [{"time": t, "series": str(s), "value": draw.poisson(3) + 1.0} for s in range(2) for t in range(12)]
    dataset = TimeSeriesDataSet(
        pd.DataFrame(rows),
        time_idx="time",
        target="value",
        group_ids=["series"],
        max_encoder_length=5,
        max_prediction_length=3,
        time_varying_unknown_reals=["value"],
        time_varying_known_reals=["time"],
        target_normalizer=EncoderNormalizer(transformation={"forward": torch.log1p}),
    )
    return dataset.to_dataloader(
        train=True, batch_size=SIZE, sampler=order(len(dataset)), shuffle=False, drop_last=False
    )


def forecaster(loss: str) -> Callable[[], Any]:
    def make() -> Any:
        import pytorch_forecasting

        dataset = series_loader().dataset
        criterion = getattr(pytorch_forecasting.metrics, loss)()
        return pytorch_forecasting.TemporalFusionTransformer.from_dataset(
            dataset, hidden_size=8, attention_head_size=2, loss=criterion, log_interval=-1, learning_rate=0.01
        )

    return make


def poisson_losses(module: Any, batch: Any) -> Tensor:
    x, (y, _) = batch
    rate = module(x)["prediction"].squeeze(-1)
    return (rate.exp() - y * rate).mean(1)


def quantile_losses(module: Any, batch: Any) -> Tensor:
    """Return what a user writes: the losses of the metric itself, without its reduction."""
    x, (y, _) = batch
    return module.loss.loss(module(x)["prediction"], y).flatten(1).mean(1)


def quantiles_by_hand(module: Any, batch: Any) -> Tensor:
    x, (y, _) = batch
    apart = y[..., None] - module(x)["prediction"]
    q = torch.tensor(module.loss.quantiles)
    return 2 * torch.maximum((q - 1) * apart, q * apart).flatten(1).mean(1)


def sentences(loss: str) -> Callable[[], Any]:
    """Return what makes a sentence encoder with a loss of sentence-transformers."""

    def make() -> Any:
        from sentence_transformers.sentence_transformer import losses

        encoder = Encoder()
        criterion = getattr(losses, loss)(encoder)
        return Task(criterion, lambda module, b: module([b["one"], b["two"]], b["label"]))

    return make


class Encoder(nn.Module):
    """A sentence encoder in the form that the losses of sentence-transformers take: features in, features out."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.network = BertModel(BertConfig(vocab_size=30, **BERT))

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        states = self.network(features["input_ids"]).last_hidden_state
        return {**features, "sentence_embedding": states.mean(1)}


def sentence_pair(g: Generator) -> dict[str, Any]:
    one, two = ({"input_ids": torch.randint(30, (6,), generator=g)} for _ in range(2))
    return {"one": one, "two": two, "label": torch.rand((), generator=g)}


def cosine_losses(module: Any, batch: Any) -> Tensor:
    one, two = (module.network.model(batch[name])["sentence_embedding"] for name in ("one", "two"))
    return (F.cosine_similarity(one, two) - batch["label"]).square()


def contrastive_losses(module: Any, batch: Any) -> Tensor:
    one, two = (module.network.model(batch[name])["sentence_embedding"] for name in ("one", "two"))
    far, y = 1 - F.cosine_similarity(one, two), batch["label"]
    return 0.5 * (y * far.square() + (1 - y) * (0.5 - far).relu().square())


def linear_probe() -> Any:
    from lightly.utils.benchmarking import LinearClassifier

    backbone = nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return LinearClassifier(backbone, SIZE, feature_dim=8, num_classes=CLASSES, topk=(1, 2))


def linear_losses(module: Any, batch: Any) -> Tensor:
    module.model.eval()
    return hard_losses(module, batch)


def simclr() -> Any:
    from lightly.loss import NTXentLoss

    criterion = NTXentLoss()
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * IMAGE * IMAGE, 8))
    return Task(network, lambda module, b: criterion(module(b[0]), module(b[0] + 0.1)))


def metric_learning() -> Any:
    from pytorch_metric_learning.losses import NTXentLoss

    criterion = NTXentLoss()
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * IMAGE * IMAGE, 8))
    return Task(network, lambda module, b: criterion(module(b[0]), b[1] % 2))


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

    logits, y = module(batch["image"]), batch["mask"].float()
    losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean((1, 2, 3))
    return (weights * losses).mean() + DiceLoss(sigmoid=True)(logits, y)


def speech() -> Any:
    from speechbrain.nnet.losses import nll_loss

    network = nn.GRU(4, CLASSES, batch_first=True)

    def step(module: Any, batch: Any) -> Tensor:
        return nll_loss(module(batch["x"])[0].log_softmax(-1), batch["y"], length=batch["length"])

    return Task(network, step)


def utterance(g: Generator) -> dict[str, Tensor]:
    length = int(torch.randint(2, 9, (), generator=g)) / 8
    return {
        "x": torch.randn(8, 4, generator=g),
        "y": torch.randint(CLASSES, (8,), generator=g),
        "length": torch.tensor(length),
    }


def speech_losses(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(module(batch["x"])[0].transpose(1, 2), batch["y"], reduction="none")
    return losses, torch.arange(8) < (8 * batch["length"]).round()[:, None]


def speech_means(module: Any, batch: Any) -> Tensor:
    losses, mask = speech_losses(module, batch)
    return (losses * mask).sum(1) / mask.sum(1)


def speech_weighted(module: Any, batch: Any, weights: Tensor) -> Tensor:
    losses, mask = speech_losses(module, batch)
    return (weights[:, None] * losses * mask).sum() / mask.sum()


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


def molecules() -> Any:
    from chemprop import data

    smiles = ["C", "CC", "CCO", "CCN", "c1ccccc1", "CC(=O)O", "CCCl", "C#N", "OCCO", "CC(C)C"]
    targets = torch.randn(10, 2, generator=Generator().manual_seed(2)).numpy()
    points = [data.MoleculeDatapoint.from_smi(s, y) for s, y in zip(smiles, targets)]
    dataset = data.MoleculeDataset(points)
    return DataLoader(dataset, SIZE, sampler=order(10), collate_fn=data.collate_batch)


def molecular() -> Any:
    from chemprop import models
    from chemprop import nn as parts

    return models.MPNN(parts.BondMessagePassing(d_h=8), parts.MeanAggregation(), parts.RegressionFFN(2, 8, 8))


def molecule_losses(module: Any, batch: Any) -> Tensor:
    graphs, atoms, extra, targets, *_ = batch
    return (module.predictor.train_step(module.fingerprint(graphs, atoms, extra)) - targets).square().mean(1)


def other_trainer(module: Any, batches: Any, callbacks: list[Any]) -> None:
    """Train with the Trainer of `pytorch_lightning`, which is another class than that of `lightning`."""
    import pytorch_lightning

    pytorch_lightning.Trainer(callbacks=callbacks, **QUIET).fit(module, batches)


def with_validation(module: Any, batches: Any, callbacks: list[Any]) -> None:
    """Train with a validation loader: the module's scheduler follows the validation loss."""
    Trainer(callbacks=callbacks, **QUIET).fit(module, batches, DataLoader(batches.dataset, SIZE))


def anomaly_loader() -> Any:
    from anomalib.data.dataclasses.torch import ImageBatch, ImageItem

    g = Generator().manual_seed(2)
    items = Samples([ImageItem(image=image(g)[0].repeat(1, 2, 2)) for _ in range(10)])
    return DataLoader(items, SIZE, sampler=order(10), collate_fn=ImageBatch.collate)


def anomaly(kind: str = "Ganomaly", **arguments: Any) -> Any:
    import anomalib.models

    parts = dict.fromkeys(("pre_processor", "post_processor", "evaluator", "visualizer"), False)
    return getattr(anomalib.models, kind)(**parts, **arguments)


def draem() -> Any:
    return anomaly("Draem")


def darts_fit(kind: str, series: Any, callbacks: list[Any]) -> None:
    """Train as darts does: it makes module, loader and Trainer itself."""
    import darts.models

    model = getattr(darts.models, kind)(
        input_chunk_length=6,
        output_chunk_length=2,
        batch_size=SIZE,
        pl_trainer_kwargs={**QUIET, "callbacks": callbacks},
    )
    model.fit(series, dataloader_kwargs={"sampler": order(len(series) - 7), "shuffle": False})


def series() -> Any:
    import darts

    return darts.TimeSeries.from_values(torch.randn(17, generator=Generator().manual_seed(2)).numpy())


def chunk_losses(module: Any, batch: Any) -> Tensor:
    out = module(batch.to_module_input()).prediction.squeeze(-1)
    return (out - batch.future_target).square().mean((1, 2))


P = Project
PIXELS = scene(IMAGE, IMAGE, name="mask")
BINARY = scene(1, IMAGE, IMAGE, name="mask", kind="binary")

PROJECTS = [
    P(
        "torchgeo",
        "ClassificationTask",
        torchgeo("ClassificationTask", model="resnet18", num_classes=CLASSES),
        scene(),
        label_losses,
        fit=with_validation,
    ),
    P(
        "torchgeo",
        "ClassificationTask, multilabel",
        torchgeo("ClassificationTask", model="resnet18", task="multilabel", num_labels=3, loss="bce"),
        scene(3, kind="binary"),
        multilabel_losses,
        fit=with_validation,
    ),
    P(
        "torchgeo",
        "SemanticSegmentationTask",
        torchgeo("SemanticSegmentationTask", model="unet", backbone="resnet18", num_classes=CLASSES, ignore_index=0),
        PIXELS,
        pixel_losses,
        pixel_weighted,
        fit=with_validation,
    ),
    P(
        "torchgeo",
        "SemanticSegmentationTask, jaccard",
        torchgeo("SemanticSegmentationTask", model="unet", backbone="resnet18", num_classes=CLASSES, loss="jaccard"),
        PIXELS,
        pixel_losses,
        refused="Give the losses",
        fit=with_validation,
    ),
    P(
        "torchgeo",
        "RegressionTask",
        torchgeo("RegressionTask", model="resnet18", num_outputs=2),
        scene(2, kind="number"),
        lambda m, b: (m(b["image"]) - b["label"]).square().mean(1),
        fit=with_validation,
    ),
    P(
        "torchgeo",
        "ObjectDetectionTask",
        torchgeo("ObjectDetectionTask", model="faster-rcnn", backbone="resnet18", num_classes=2),
        detection(),
        label_losses,
        refused="fails in evaluation mode",
        note="in evaluation mode the network gives boxes, no losses",
        fit=with_validation,
    ),
    P(
        "segmentation-models-pytorch",
        "Unet, SoftBCEWithLogitsLoss",
        segmentation("SoftBCEWithLogitsLoss"),
        BINARY,
        binary_pixel_losses,
    ),
    P(
        "segmentation-models-pytorch",
        "Unet, DiceLoss",
        segmentation("DiceLoss", mode="binary"),
        BINARY,
        dice_by_hand,
        refused="Give the losses",
    ),
    P(
        "segmentation-models-pytorch",
        "Unet, DiceLoss of each image as sample_losses",
        segmentation("DiceLoss", mode="binary"),
        BINARY,
        dice_by_hand,
        arguments={"sample_losses": image_dice},
    ),
    P(
        "segmentation-models-pytorch",
        "Unet, FocalLoss",
        segmentation("FocalLoss", mode="binary"),
        BINARY,
        dice_by_hand,
        refused="Give the losses",
    ),
    P("torch-geometric", "GIN, one class for each graph", graphs(True), graph_loader, graph_losses),
    P(
        "torch-geometric",
        "GIN, one class for each node",
        graphs(False),
        graph_loader,
        graph_losses,
        refused="Give the losses",
    ),
    P(
        "pytorch-forecasting",
        "TemporalFusionTransformer, PoissonLoss",
        forecaster("PoissonLoss"),
        series_loader,
        poisson_losses,
        refused="FLOW needs losses >= 0",
        note="negative losses",
    ),
    P(
        "pytorch-forecasting",
        "TemporalFusionTransformer, QuantileLoss",
        forecaster("QuantileLoss"),
        series_loader,
        quantiles_by_hand,
        refused="Give the losses",
    ),
    P(
        "pytorch-forecasting",
        "TemporalFusionTransformer, QuantileLoss as sample_losses",
        forecaster("QuantileLoss"),
        series_loader,
        quantiles_by_hand,
        arguments={"sample_losses": quantile_losses},
    ),
    P(
        "sentence-transformers",
        "CosineSimilarityLoss",
        sentences("CosineSimilarityLoss"),
        loader(sentence_pair),
        cosine_losses,
    ),
    P(
        "sentence-transformers",
        "ContrastiveLoss of pairs",
        sentences("ContrastiveLoss"),
        loader(sentence_pair),
        contrastive_losses,
        refused="Give the losses",
    ),
    P(
        "sentence-transformers",
        "ContrastiveLoss as sample_losses",
        sentences("ContrastiveLoss"),
        loader(sentence_pair),
        contrastive_losses,
        arguments={"sample_losses": contrastive_losses},
    ),
    P(
        "sentence-transformers",
        "MultipleNegativesRankingLoss",
        sentences("MultipleNegativesRankingLoss"),
        loader(sentence_pair),
        cosine_losses,
        refused="Give the losses",
        note="each sample against all others of its batch",
    ),
    P("lightly", "LinearClassifier", linear_probe, loader(image), linear_losses, fit=other_trainer),
    P("lightly", "NTXentLoss", simclr, loader(image), hard_losses, refused="depends on the others"),
    P("pytorch-metric-learning", "NTXentLoss", metric_learning, loader(image), hard_losses, refused="Give the losses"),
    P("monai", "UNet, DiceLoss", monai("DiceLoss"), BINARY, dice_by_hand, refused="Give the losses"),
    P(
        "monai",
        "UNet, DiceCELoss",
        monai("DiceCELoss"),
        BINARY,
        binary_pixel_losses,
        dice_ce_weighted,
        note="the dice term is no loss of torch: it is not weighted, and the callback says so",
    ),
    P("speechbrain", "GRU, nll_loss with lengths", speech, loader(utterance), speech_means, speech_weighted),
    P(
        "torchvision",
        "sigmoid_focal_loss",
        focal,
        loader(image),
        scored_focal_losses,
        note="scored: the mean of the elements, weighted by their focal factors",
    ),
    P(
        "torchvision",
        "sigmoid_focal_loss as sample_losses",
        focal,
        loader(image),
        focal_losses,
        arguments={"sample_losses": own_focal_losses},
    ),
    P("darts", "NLinearModel, MSELoss", lambda: "NLinearModel", series, chunk_losses, fit=darts_fit),
    P("darts", "TiDEModel, MSELoss", lambda: "TiDEModel", series, chunk_losses, fit=darts_fit),
    P(
        "anomalib",
        "Ganomaly",
        anomaly,
        anomaly_loader,
        label_losses,
        refused="fails in evaluation mode",
        note="in evaluation mode the network gives scores, no images",
    ),
    P("anomalib", "Draem", draem, anomaly_loader, label_losses, refused="Give the losses"),
    P("chemprop", "MPNN, MSE", molecular, molecules, molecule_losses),
]
