"""Projects that need no package beyond those of the tests: Lightning's demos, transformers, torchvision, timm."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Generator, Tensor, nn

from tests.foreign.project import QUIET, Project, loader

IMAGE, CLASSES, WORDS, LENGTH = 32, 5, 30, 6


class Task(LightningModule):
    """A network of a package, and a training step as users write it.

    Args:
        network: The network.
        step: Computes the loss of module and batch.
    """

    def __init__(self, network: nn.Module, step: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.network, self.step = network, step

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.step(self, batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


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


BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


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


def image(g: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(3, IMAGE, IMAGE, generator=g), torch.randint(CLASSES, (), generator=g)


def torchvision_reference() -> LightningModule:
    import torchvision

    network = torchvision.models.mobilenet_v3_small(num_classes=CLASSES)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    return Task(network, lambda module, batch: criterion(module(batch[0]), batch[1]))


def smoothed_losses(module: Any, batch: Any) -> Tensor:
    log_probs = module(batch[0]).log_softmax(1)
    own = log_probs.gather(1, batch[1][:, None]).squeeze(1)
    return -0.9 * own - 0.1 * log_probs.mean(1)


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


def other_boring() -> Any:
    from pytorch_lightning.demos.boring_classes import BoringModel

    return BoringModel()


def only_trains() -> LightningModule:
    """A network that makes something else in evaluation mode, as detectors do."""

    def step(module: Any, batch: Any) -> Tensor:
        out = module(batch[0])
        return F.cross_entropy(out if module.training else {"classes": out.argmax(1)}, batch[1])

    return Task(timm_network(), step)


PROJECTS = [
    Project(
        "lightning",
        "BoringModel, mse_loss",
        boring,
        loader(lambda g: torch.randn(32, generator=g)),
        lambda module, x: (module(x) - 1).square().mean(1),
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
    Project(
        "torchvision",
        "MobileNetV3, cross_entropy with label smoothing",
        torchvision_reference,
        loader(image),
        smoothed_losses,
    ),
    Project("torch", "a table, BCEWithLogitsLoss with pos_weight", table, loader(row), table_losses),
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
        note="the loss is written in tensor operations",
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
    ),
    Project(
        "torch",
        "a network with other outputs in evaluation mode",
        only_trains,
        loader(image),
        hard_losses,
        refused="fails in evaluation mode",
    ),
    Project("torch", "CosineEmbeddingLoss of pairs", pairs, loader(pair), pair_losses),
    Project(
        "torch",
        "contrastive cross_entropy, B x B",
        contrastive,
        loader(pair),
        pair_losses,
        refused="depends on the others",
    ),
]
