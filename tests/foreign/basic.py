"""Lightning's demos, transformers, a table and pairs: projects that need no package beyond those of the tests."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from torch import Generator, Tensor, nn

from tests.foreign.project import CLASSES, OTHERS, QUIET, Project, Task, fit_elsewhere, loader, mean_of_all, means

WORDS, LENGTH = 30, 6


def demo_transformer() -> LightningModule:
    from lightning.pytorch.demos.transformer import LightningTransformer

    module = LightningTransformer(vocab_size=WORDS)
    vars(module)["prepare_data"] = lambda: None  # it downloads a text
    return module


def boring(library: str) -> Callable[[], Any]:
    return lambda: import_module(f"{library}.demos.boring_classes").BoringModel()


def boring_losses(module: Any, x: Any) -> Tensor:
    return (module(x) - 1).square().mean(1)


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


BERT: Any = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT["initializer_range"] = 0.3


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


def next_token_losses(module: Any, batch: Any) -> tuple[Tensor, Tensor]:
    return token_losses(module, batch, 1)


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


def own_loader(module: Any, batches: Any, callbacks: list[Any]) -> None:
    """Train on what the module itself loads: other random numbers each time."""
    Trainer(callbacks=callbacks, **QUIET).fit(module)


def hardest() -> LightningModule:
    """Online hard example mining: the mean of the larger half of the losses."""

    def step(module: Any, batch: Any) -> Tensor:
        one, two = module(batch[0]), module(batch[1])
        losses = F.cosine_embedding_loss(one, two, torch.ones(len(one)), reduction="none")
        return losses.topk(max(1, len(losses) // 2)).values.mean()

    return Task(nn.Linear(8, 4), step)


def time_first() -> LightningModule:
    def step(module: Any, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(module(x.transpose(0, 1))[0].flatten(0, 1), y.T.flatten())

    return Task(nn.GRU(3, CLASSES), step)


VECTORS, PAIRS = loader(lambda g: torch.randn(32, generator=g)), loader(pair)
SERIES = loader(lambda g: (torch.randn(8, 3, generator=g), torch.randint(CLASSES, (8,), generator=g)))
TEXTS, LABELLED, PADDED, TAGGED = (
    loader(f) for f in (lambda g: (words(g), words(g)), labelled_text, padded_text, tagged_text)
)
SEQUENCES = transformer("BertConfig BertForSequenceClassification", num_labels=CLASSES, **BERT)
TOKENS = transformer("BertConfig BertForTokenClassification", num_labels=CLASSES, **BERT)
GPT = transformer("GPT2Config GPT2LMHeadModel", n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
BORING, ELSEWHERE = boring("lightning.pytorch"), boring("pytorch_lightning")
BY_TOKEN, BY_NEXT_TOKEN = ((means(parts), mean_of_all(parts)) for parts in (token_losses, next_token_losses))
NEW_SAMPLES, BY_TIME = "gives other samples than when they were scored", "its row is not its place in the batch"

PROJECTS = [
    Project("lightning", "BoringModel, mse_loss", BORING, VECTORS, boring_losses),
    Project("lightning", "BoringModel, its own train_dataloader", BORING, VECTORS, refused=NEW_SAMPLES, fit=own_loader),
    Project(
        "pytorch-lightning",
        "its BoringModel, LightningDataModule and Trainer",
        ELSEWHERE,
        VECTORS,
        boring_losses,
        fit=fit_elsewhere,
    ),
    Project("lightning", "LightningTransformer, nll_loss of tokens", demo_transformer, TEXTS, demo_losses),
    Project("transformers", "BertForSequenceClassification", SEQUENCES, LABELLED, label_losses),
    Project("transformers", "GPT2LMHeadModel, padded", GPT, PADDED, *BY_NEXT_TOKEN),
    Project("transformers", "BertForTokenClassification, padded", TOKENS, TAGGED, *BY_TOKEN),
    Project("torch", "a table, BCEWithLogitsLoss with pos_weight", table, loader(row), table_losses),
    Project("torch", "CosineEmbeddingLoss of pairs", pairs, PAIRS, pair_losses),
    Project("torch", "the hardest half of a batch", hardest, PAIRS, refused=OTHERS),
    Project("torch", "GRU, its losses time by time", time_first, SERIES, refused=BY_TIME),
    Project("torch", "contrastive cross_entropy, B x B", contrastive, PAIRS, refused=OTHERS),
]
