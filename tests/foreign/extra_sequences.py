"""Projects on graphs, series, sentences and speech, of packages that the tests do not need."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from tests.foreign.basic import BERT
from tests.foreign.project import CLASSES, GIVE_LOSSES, QUIET, SIZE, Project, Task, loader, mean_of_all, means, order


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
            return F.cross_entropy(*(global_mean_pool(out, batch.batch), batch.y) if pooled else (out, batch.nodes))

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


def similarities(module: Any, batch: Any) -> Tensor:
    one, two = (module.network.model(batch[name])["sentence_embedding"] for name in ("one", "two"))
    return F.cosine_similarity(one, two)


def cosine_losses(module: Any, batch: Any) -> Tensor:
    return (similarities(module, batch) - batch["label"]).square()


def contrastive_losses(module: Any, batch: Any) -> Tensor:
    far, y = 1 - similarities(module, batch), batch["label"]
    return 0.5 * (y * far.square() + (1 - y) * (0.5 - far).relu().square())


def speech() -> Any:
    from speechbrain.nnet.losses import nll_loss

    network = nn.GRU(4, CLASSES, batch_first=True)

    def step(module: Any, batch: Any) -> Tensor:
        return nll_loss(module(batch["x"])[0].log_softmax(-1), batch["y"], length=batch["length"])

    return Task(network, step)


def utterance(g: Generator) -> dict[str, Tensor]:
    length = int(torch.randint(2, 9, (), generator=g)) / 8
    x, y = torch.randn(8, 4, generator=g), torch.randint(CLASSES, (8,), generator=g)
    return {"x": x, "y": y, "length": torch.tensor(length)}


def speech_losses(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(module(batch["x"])[0].transpose(1, 2), batch["y"], reduction="none")
    return losses, torch.arange(8) < (8 * batch["length"]).round()[:, None]


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


def darts_fit(kind: str, series: Any, callbacks: list[Any]) -> None:
    """Train as darts does: it makes module, loader and Trainer itself."""
    import darts.models

    settings = {**QUIET, "callbacks": callbacks}
    model = getattr(darts.models, kind)(6, 2, batch_size=SIZE, pl_trainer_kwargs=settings)
    model.fit(series, dataloader_kwargs={"sampler": order(len(series) - 7), "shuffle": False})


def series() -> Any:
    import darts

    return darts.TimeSeries.from_values(torch.randn(17, generator=Generator().manual_seed(2)).numpy())


def chunk_losses(module: Any, batch: Any) -> Tensor:
    out = module(batch.to_module_input()).prediction.squeeze(-1)
    return (out - batch.future_target).square().mean((1, 2))


PAIRS, CONTRASTIVE = loader(sentence_pair), sentences("ContrastiveLoss")
QUANTILES, POISSON = forecaster("QuantileLoss"), forecaster("PoissonLoss")
GRAPHS = partial(Project, "torch-geometric", loader=graph_loader)
FORECASTS = partial(Project, "pytorch-forecasting", loader=series_loader)
SENTENCES = partial(Project, "sentence-transformers", loader=PAIRS)
DARTS = partial(Project, "darts", loader=series, losses=chunk_losses, fit=darts_fit)
BY_STEP = (means(speech_losses), mean_of_all(speech_losses))

PROJECTS = [
    GRAPHS("GIN, one class for each graph", graphs(True), losses=graph_losses),
    GRAPHS("GIN, one class for each node", graphs(False), refused=GIVE_LOSSES),
    FORECASTS("TemporalFusionTransformer, PoissonLoss", POISSON, refused="FLOW needs losses >= 0"),
    FORECASTS("TemporalFusionTransformer, QuantileLoss", QUANTILES, refused=GIVE_LOSSES),
    FORECASTS(
        "TemporalFusionTransformer, QuantileLoss as sample_losses",
        QUANTILES,
        losses=quantiles_by_hand,
        sample_losses=quantile_losses,
    ),
    SENTENCES("CosineSimilarityLoss", sentences("CosineSimilarityLoss"), losses=cosine_losses),
    SENTENCES("ContrastiveLoss of pairs", CONTRASTIVE, refused=GIVE_LOSSES),
    SENTENCES(
        "ContrastiveLoss as sample_losses", CONTRASTIVE, losses=contrastive_losses, sample_losses=contrastive_losses
    ),
    SENTENCES("MultipleNegativesRankingLoss", sentences("MultipleNegativesRankingLoss"), refused=GIVE_LOSSES),
    Project("speechbrain", "GRU, nll_loss with lengths", speech, loader(utterance), *BY_STEP),
    DARTS("NLinearModel, MSELoss", lambda: "NLinearModel"),
    DARTS("TiDEModel, MSELoss", lambda: "TiDEModel"),
    Project("chemprop", "MPNN, MSE", molecular, molecules, molecule_losses),
]
