"""Lightning's demos, transformers, a table and pairs: projects that need no package beyond those of the tests."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from torch import Generator, Tensor, nn

from tests.foreign.project import CLASSES, QUIET, Project, Task, loader

WORDS, LENGTH = 30, 6


def demo_transformer() -> LightningModule:
    from lightning.pytorch.demos.transformer import LightningTransformer

    module = LightningTransformer(vocab_size=WORDS)
    vars(module)["prepare_data"] = lambda: None  # it downloads a text
    return module


def boring() -> LightningModule:
    from lightning.pytorch.demos.boring_classes import BoringModel

    return BoringModel()


def demo_losses(module: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.nll_loss(module(x, y).view(*y.shape, WORDS).transpose(1, 2), y, reduction="none").mean(1)


def words(g: Generator) -> Tensor:
    return torch.randint(WORDS, (LENGTH,), generator=g)


def transformer(kind: str, **settings: Any) -> Callable[[], LightningModule]:
    """Return what makes a tiny transformer of transformers; the step takes the loss that the network computes."""

    def make() -> LightningModule:
        import transformers

        config_class, network = kind.split()
        config = getattr(transformers, config_class)(vocab_size=WORDS, **settings)
        return Task(getattr(transformers, network)(config), lambda module, batch: module(**batch).loss)

    return make


BERT = {
    "initializer_range": 0.3,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def labelled_text(g: Generator) -> dict[str, Tensor]:
    return {"input_ids": words(g), "labels": torch.randint(CLASSES, (), generator=g)}


def padded_text(g: Generator) -> dict[str, Tensor]:
    """Return text of 2 to 6 words; the rest is padding."""
    length = int(torch.randint(2, LENGTH + 1, (), generator=g))
    mask = torch.arange(LENGTH) < length
    x = words(g)
    return {"input_ids": x, "attention_mask": mask.long(), "labels": x.masked_fill(~mask, -100)}


def tagged_text(g: Generator) -> dict[str, Tensor]:
    text = padded_text(g)
    tags = torch.randint(CLASSES, (LENGTH,), generator=g)
    return {**text, "labels": tags.masked_fill(text["attention_mask"] == 0, -100)}


def label_losses(module: Any, batch: Any) -> Tensor:
    logits = module(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")


def token_losses(module: Any, batch: Any, shift: int = 0) -> tuple[Tensor, Tensor]:
    """Return the losses of all tokens, and which of them count."""
    logits = module(**{name: value for name, value in batch.items() if name != "labels"}).logits
    labels = batch["labels"][:, shift:]
    losses = F.cross_entropy(logits[:, : LENGTH - shift].transpose(1, 2), labels, reduction="none")
    return losses, labels != -100


def token_means(shift: int) -> Any:
    def means(module: Any, batch: Any) -> Tensor:
        losses, counts = token_losses(module, batch, shift)
        return losses.sum(1) / counts.sum(1)

    return means


def token_weighted(shift: int) -> Any:
    def weighted(module: Any, batch: Any, weights: Tensor) -> Tensor:
        losses, counts = token_losses(module, batch, shift)
        return (weights[:, None] * losses).sum() / counts.sum()

    return weighted


class Table(nn.Module):
    """A network for a table: two categories, embedded, and three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(4, 3), nn.Embedding(6, 3)])
        self.net = nn.Sequential(nn.Linear(9, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        embedded = [embed(column) for embed, column in zip(self.embeddings, categories.T)]
        return self.net(torch.cat([*embedded, numbers], dim=1)).squeeze(1)


def row(g: Generator) -> dict[str, Tensor]:
    return {
        "categories": torch.randint(4, (2,), generator=g),
        "numbers": torch.randn(3, generator=g),
        "target": torch.randint(2, (), generator=g).float(),
    }


def table() -> LightningModule:
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))
    return Task(Table(), lambda module, b: criterion(module(b["categories"], b["numbers"]), b["target"]))


def table_losses(module: Any, batch: Any) -> Tensor:
    p, y = module(batch["categories"], batch["numbers"]).sigmoid(), batch["target"]
    return -3 * y * p.log() - (1 - y) * (1 - p).log()


def pair(g: Generator) -> tuple[Tensor, Tensor, Tensor]:
    sign = 2.0 * torch.randint(2, (), generator=g) - 1
    return torch.randn(8, generator=g), torch.randn(8, generator=g), sign


def contrastive() -> LightningModule:
    """SimCLR's loss: each sample against all others of its batch."""

    def step(module: Any, batch: Any) -> Tensor:
        one, two = (F.normalize(module(x)) for x in batch[:2])
        return F.cross_entropy(one @ two.T / 0.1, torch.arange(len(one)))

    return Task(nn.Linear(8, 4), step)


def pairs() -> LightningModule:
    criterion = nn.CosineEmbeddingLoss(margin=-0.9)
    return Task(nn.Linear(8, 4), lambda module, b: criterion(module(b[0]), module(b[1]), b[2]))


def pair_losses(module: Any, batch: Any) -> Tensor:
    cosine = F.cosine_similarity(module(batch[0]), module(batch[1]))
    return torch.where(batch[2] > 0, 1 - cosine, (cosine + 0.9).clamp_min(0))


def other_lightning(module: Any, batches: Any, callbacks: list[Any]) -> None:
    """Train with the classes of `pytorch_lightning`, which are others than those of `lightning`."""
    import pytorch_lightning

    datamodule = pytorch_lightning.LightningDataModule()
    vars(datamodule)["train_dataloader"] = lambda: batches
    pytorch_lightning.Trainer(callbacks=callbacks, **QUIET).fit(module, datamodule=datamodule)


def own_loader(module: Any, batches: Any, callbacks: list[Any]) -> None:
    """Train on what the module itself loads: other random numbers each time."""
    Trainer(callbacks=callbacks, **QUIET).fit(module)


def other_boring() -> Any:
    from pytorch_lightning.demos.boring_classes import BoringModel

    return BoringModel()


def hardest() -> LightningModule:
    """Online hard example mining: the mean of the larger half of the losses."""

    def step(module: Any, batch: Any) -> Tensor:
        losses = F.cosine_embedding_loss(
            module(batch[0]), module(batch[1]), torch.ones(len(batch[0])), reduction="none"
        )
        return losses.topk(max(1, len(losses) // 2)).values.mean()

    return Task(nn.Linear(8, 4), step)


def time_first() -> LightningModule:
    def step(module: Any, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(module(x.transpose(0, 1))[0].flatten(0, 1), y.T.flatten())

    return Task(nn.GRU(3, CLASSES), step)


PROJECTS = [
    Project(
        "lightning",
        "BoringModel, mse_loss",
        boring,
        loader(lambda g: torch.randn(32, generator=g)),
        lambda module, x: (module(x) - 1).square().mean(1),
    ),
    Project(
        "lightning",
        "BoringModel, its own train_dataloader",
        boring,
        loader(lambda g: torch.randn(32, generator=g)),
        lambda module, x: (module(x) - 1).square().mean(1),
        refused="gives other samples than when they were scored",
        note="the samples are drawn anew at each call",
        fit=own_loader,
    ),
    Project(
        "pytorch-lightning",
        "its BoringModel, LightningDataModule and Trainer",
        other_boring,
        loader(lambda g: torch.randn(32, generator=g)),
        lambda module, x: (module(x) - 1).square().mean(1),
        fit=other_lightning,
    ),
    Project(
        "lightning",
        "LightningTransformer, nll_loss of tokens",
        demo_transformer,
        loader(lambda g: (words(g), words(g))),
        demo_losses,
    ),
    Project(
        "transformers",
        "BertForSequenceClassification",
        transformer("BertConfig BertForSequenceClassification", num_labels=CLASSES, **BERT),
        loader(labelled_text),
        label_losses,
    ),
    Project(
        "transformers",
        "GPT2LMHeadModel, padded",
        transformer("GPT2Config GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0),
        loader(padded_text),
        token_means(1),
        token_weighted(1),
        note="a sample's loss is the mean of its own tokens",
    ),
    Project(
        "transformers",
        "BertForTokenClassification, padded",
        transformer("BertConfig BertForTokenClassification", num_labels=CLASSES, **BERT),
        loader(tagged_text),
        token_means(0),
        token_weighted(0),
    ),
    Project("torch", "a table, BCEWithLogitsLoss with pos_weight", table, loader(row), table_losses),
    Project("torch", "CosineEmbeddingLoss of pairs", pairs, loader(pair), pair_losses),
    Project(
        "torch",
        "the hardest half of a batch",
        hardest,
        loader(pair),
        pair_losses,
        refused="depends on the others",
        note="which losses count depends on the others of the batch",
    ),
    Project(
        "torch",
        "GRU, its losses time by time",
        time_first,
        loader(lambda g: (torch.randn(8, 3, generator=g), torch.randint(CLASSES, (8,), generator=g))),
        pair_losses,
        refused="its row is not its place in the batch",
        note="rows of losses in the order of time, not of samples",
    ),
    Project(
        "torch",
        "contrastive cross_entropy, B x B",
        contrastive,
        loader(pair),
        pair_losses,
        refused="depends on the others",
        note="each sample against all others of its batch",
    ),
]
