"""What is computed of a batch by a module that declares nothing: from its own `training_step`.

In: module and batch. Out: losses of samples, or features and targets for a probe. Next: `scoring.py`.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flow_lightning.data.indexing import part_of
from flow_lightning.lightning_internals import isolate_rng, training_source
from flow_lightning.method.interception import Interception, Term, sample_losses
from flow_lightning.scoring.evaluation import batch_norms, evaluation, evaluation_stage
from flow_lightning.scoring.fingerprint import seed_generators
from flow_lightning.scoring.kinds import ProbeFeatures, SampleLosses
from flow_lightning.scoring.own_step import HOW_TO_GIVE_LOSSES, call_training_step, dependent, unnoticed
from flow_lightning.scoring.samples import Samples, cut_batches
from flow_lightning.scoring.score import is_out_of_memory, on_device, with_what_fits

#: Most samples of the batch with which a step is tried first.
_LOOK = 32
#: How often the order of a batch in training is looked at.
_DRAWS = 5
#: How far losses of the same sample may be apart, relative to them and to the typical loss.
_TOLERANCE = 1e-3


class StepLosses(SampleLosses):
    """The losses of samples in a module's own `training_step`: `losses` `[n]`.

    Args:
        loss: The one loss of `torch.nn.functional` that counts, by name; None for all.
        key: Which of several training loaders is scored; the step sees the first batch of each other one beside it.

    Attributes:
        classes: Classes of the first cross-entropy that was seen; 0 if there was none.
        alone: Losses that have no batch dimension, see `Interception`.
    """

    def __init__(self, loss: str | None = None, key: str | int | None = None) -> None:
        super().__init__()
        self.loss, self.key, self.classes = loss, key, 0
        self.alone: set[tuple[Any, ...]] = set()
        self._rows: dict[str, set[int]] = {}  # of the last step that ran
        self._company: Any = None  # the batches of all loaders, to be scored beside
        self._loss_of: Callable[[Any], Tensor | None] = lambda output: None

    def inspect(self, trainer: Trainer, module: LightningModule, samples: Samples) -> None:
        """Refuse a step whose losses of a sample depend on which others are in its batch.

        Raises:
            ValueError: If they do, or if there are none.
            TypeError: If the step draws its batches by itself.
        """
        if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
            raise TypeError(
                f"{type(module).__name__}.training_step takes a dataloader_iter and draws its batches by itself, so it "
                "is not known which samples are in them. Let it take `batch`."
            )
        if self.key is not None:
            self._company = _first_batches(trainer, module)
        chosen = [samples.loader.dataset[i] for i in samples.batches[0][:_LOOK]]
        with_what_fits(trainer, partial(self._inspect, trainer, module, samples.loader.collate_fn), chosen)

    def _inspect(self, trainer: Trainer, module: LightningModule, collate: Any, chosen: list[Any]) -> None:
        half = len(chosen) // 2 + len(chosen) % 2

        def losses(*items: Any) -> Tensor:
            with _CopyViews():
                own = [copy.deepcopy(item) for item in items]  # a collate function may change what it gets
            (batch,) = on_device(trainer, module, [collate(own)])
            return self._sample_losses(module, batch, len(items))

        with self.context(trainer, module), evaluation(module), evaluation_stage(trainer):
            # Of another size, so that losses without the batch's dimension show.
            with isolate_rng(), suppress(Exception):
                losses(*chosen[:1] * (2 if len(chosen) in (1, 3) else 3))
            with isolate_rng():
                whole = losses(*chosen)
            with isolate_rng():
                part, again = losses(*chosen[:half][::-1]).flip(0), losses(*chosen)
                # The smallest losses among themselves: what was left out beside harder samples counts now.
                easy = [chosen[i] for i in (whole == whole.min()).nonzero().flatten().tolist()] or chosen
                least = losses(*(easy * half)[: max(half, len(easy))]) - whole.min()
            if is_random := _differ(whole, again):
                with isolate_rng():
                    same = losses(*chosen)
                with isolate_rng():  # the same random numbers, in other company
                    part = losses(*chosen[:half], *chosen[: len(chosen) - half])[:half]
        if is_random:
            rank_zero_warn(
                "The losses of a sample are random in evaluation mode, too: the weights come from one random draw."
            )
        tolerance = _TOLERANCE / 10 if is_random else _TOLERANCE  # batches of the same size: bit for bit, mostly
        depends = _differ(whole[:half], part, tolerance) and not (is_random and _differ(whole, same, tolerance))
        if depends or (not is_random and bool((least.abs() > _TOLERANCE * whole.abs().mean()).any())):
            raise dependent(module, whole)
        with self.context(trainer, module), evaluation(batch_norms(module)):
            self._check_training(module, chosen[:8], losses)

    def _check_training(self, module: LightningModule, chosen: list[Any], losses: Callable[..., Tensor]) -> None:
        """Refuse a step that shuffles its batch in training alone, and tell of one that mixes it."""
        if len(chosen) < 4:
            return
        rows = self._rows
        try:
            found = [self._company_in_training(module, chosen, losses, seed) for seed in range(_DRAWS)]
        except Exception as error:  # what a step needs in training may not be there yet
            rank_zero_warn(
                f"{type(module).__name__}.training_step fails in training mode before the fit ({error!r}), so it was "
                "not checked whether it mixes or shuffles its batch. The first batch proves the rest."
            )
            return
        if rows != self._rows:  # more views in training: the proof refuses them
            return
        name = f"{type(module).__name__}.training_step"
        if found.count("another") >= _DRAWS - 1:  # a mixed sample is another one by chance, now and then
            raise ValueError(
                f"{name} puts the samples of a batch in another order in training, so it is not known whose weight a "
                "loss gets. Leave that out, or shuffle in the DataLoader."
            )
        if found.count("own") < _DRAWS:
            rank_zero_warn(
                f"{name} mixes the samples of a batch in training (mixup, cutmix, negatives): a mixed sample has the "
                "weight of the one in whose row it is."
            )

    def _company_in_training(
        self, module: LightningModule, chosen: list[Any], losses: Callable[..., Tensor], seed: int
    ) -> str:
        """Tell whose losses the rows of a batch have in training: their "own", those of "another", or "mixed" ones."""
        half = len(chosen) // 2
        first, rest = chosen[:half], chosen[half:]

        def drawn_alike(*items: Any) -> Tensor:
            with isolate_rng():
                seed_generators(seed)
                if module.device.type != "cpu":
                    torch.manual_seed(seed)  # without a device in use this formats stack traces
                return losses(*items)[:half]

        whole, other = drawn_alike(*chosen), drawn_alike(*first, *rest[1:], rest[0])
        if not _differ(whole, other) or _differ(whole, drawn_alike(*chosen)):
            return "own"
        own = drawn_alike(*first[1:], first[0], *rest)
        by_row = zip(*(each.split(1) for each in (whole, other, own)))
        is_another = any(_differ(one, two) and not _differ(one, three) for one, two, three in by_row)
        return "another" if is_another else "mixed"

    @contextmanager
    def context(self, trainer: Trainer, module: LightningModule) -> Iterator[None]:
        """Let steps run without a trace, and without a graph behind the losses."""
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        with unnoticed(trainer, module) as self._loss_of:
            for parameter in trained:
                parameter.requires_grad_(False)
            try:
                yield
            finally:
                for parameter in trained:
                    parameter.requires_grad_(True)

    def values(self, module: LightningModule, batch: Any) -> tuple[Tensor, ...]:
        """Return the losses, `[B]` float32."""
        return (self._sample_losses(module, batch, len(vars(module)["batch_samples"])),)

    def _sample_losses(self, module: LightningModule, batch: Any, size: int) -> Tensor:
        loss, interception = self.step(module, batch, size)
        try:
            return sample_losses(loss, interception)
        except (ValueError, RuntimeError) as error:  # the latter of losses in a part that torch.utils.checkpoint runs
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"{type(module).__name__}.training_step cannot be weighed: {error} {HOW_TO_GIVE_LOSSES}"
            ) from error

    def step(self, module: LightningModule, batch: Any, size: int) -> tuple[Tensor, Interception]:
        """Run a step inside of `context`, and return its loss and what was seen of its losses."""
        with torch.enable_grad(), Interception(size, None, self.loss, True, self.alone) as interception:
            try:
                output = call_training_step(module, self._beside_others(batch), 0)
            except Exception as error:
                self._loss_of(None)  # forgets what was given to manual_backward before
                if is_out_of_memory(error):
                    raise
                raise RuntimeError(
                    f"{type(module).__name__}.training_step fails in evaluation mode, in which samples are scored "
                    f"({type(error).__name__}: {error}). {HOW_TO_GIVE_LOSSES}"
                ) from error
            loss, self._rows = self._loss_of(output), interception.rows
        if loss is None:
            raise TypeError(
                f"{type(module).__name__}.training_step gave no loss for a batch, so its samples cannot be scored. "
                f"Return the loss. {HOW_TO_GIVE_LOSSES}"
            )
        for term in interception.terms:
            if not self.classes and term.name == "cross_entropy" and term.input.ndim > 1:
                self.classes = term.input.shape[1]
        return loss, interception

    def _beside_others(self, batch: Any) -> Any:
        """Return what a step gets: the batch, or it among the batches of the other loaders."""
        if self.key is None:
            return batch
        if isinstance(self._company, dict):
            return self._company | {self.key: batch}
        return [batch if number == self.key else other for number, other in enumerate(self._company)]


class _CopyViews(TorchFunctionMode):
    """Lets `deepcopy` copy the elements of a tensor alone: by itself it copies all of which the tensor is a view."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Copy a tensor; call anything else as it is."""
        return args[0].detach().clone() if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def _first_batches(trainer: Trainer, module: LightningModule) -> Any:
    """Return the first batch of each training loader, on the device, in the order of their data sets."""
    loaders = part_of(training_source(trainer), None)
    named = loaders if isinstance(loaders, dict) else dict(enumerate(loaders))
    batches = {}
    for name, loader in named.items():
        collate: Any = loader.collate_fn
        (batches[name],) = on_device(trainer, module, [collate([loader.dataset[i] for i in cut_batches(loader)[0]])])
    return batches if isinstance(loaders, dict) else list(batches.values())


def _differ(one: Tensor, other: Tensor, tolerance: float = _TOLERANCE) -> bool:
    bound = tolerance * (one.abs() + one.abs().median())
    return bool(((one - other).abs() > bound).any())


class StepFeatures(ProbeFeatures):
    """What the last linear layer of an unchanged module sees, with the targets of its cross-entropy, for a probe.

    Attributes:
        head: That layer, once `inspect` has found it; `new_parts` then has its name.
    """

    def __init__(self, folds: int = 0, memory_budget: float = 4.0, description: str = "Linear probe") -> None:
        super().__init__(0, folds, memory_budget, description)
        self._losses = StepLosses("cross_entropy")

    def context(self, trainer: Trainer, module: LightningModule) -> Any:
        """See `StepLosses.context`."""
        return self._losses.context(trainer, module)

    def inspect(self, trainer: Trainer, module: LightningModule, samples: Samples) -> None:
        """Find the layer.

        Raises:
            TypeError: If no linear layer with a bias makes the logits of a cross-entropy.
        """
        collate: Any = samples.loader.collate_fn

        def observe(chosen: list[Any]) -> Any:
            with self.context(trainer, module), evaluation(module), evaluation_stage(trainer):
                (moved,) = on_device(trainer, module, [collate(chosen)])
                return self._observe(module, moved, len(chosen))[0]

        found = with_what_fits(trainer, observe, [samples.loader.dataset[i] for i in samples.batches[0]])
        if found is None or found[0].bias is None:
            raise TypeError(
                f"{type(module).__name__} cannot be probed: in its training_step no nn.Linear with a bias makes the "
                "logits of a cross-entropy, one for each sample. Give it features(batch) -> [B, D] and a `head`."
            )
        self.head, self.classes = found[0], found[0].out_features
        self.new_parts = tuple(f"{name}." for name, part in module.named_modules() if part is self.head)
        rank_zero_info(f"Linear probe: the head is {self.new_parts[0][:-1]}, {self.head}.")

    def values(self, module: LightningModule, batch: Any) -> tuple[Tensor, ...]:
        """Return features `[B, D]` float32 and targets `[B]`."""
        found, term = self._observe(module, batch, len(vars(module)["batch_samples"]))
        if found is None or found[0] is not self.head:
            raise ValueError("The logits of a batch come from another layer than those of the first batch.")
        return found[1].detach().float(), term.target

    def _observe(
        self, module: LightningModule, batch: Any, size: int
    ) -> tuple[tuple[nn.Linear, Tensor, Tensor] | None, Any]:
        """Run a step, and return the linear layer behind its cross-entropy with its input, and the call."""
        seen: list[tuple[nn.Linear, Tensor, Tensor]] = []

        def note(linear: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((linear, inputs[0].detach(), output.detach()))

        with ExitStack() as hooks:
            for part in module.modules():
                if isinstance(part, nn.Linear):
                    hooks.enter_context(part.register_forward_hook(note))
            _, interception = self._losses.step(module, batch, size)
        for term in interception.terms:
            for linear, features, output in reversed(seen):
                if features.shape[:-1].numel() == size and _makes(output, term):
                    return (linear, features.flatten(0, -2), output), term
        return None, None


def _makes(output: Tensor, term: Term) -> bool:
    """Tell whether the output of a layer is what a cross-entropy of class indices takes, perhaps in another type."""
    logits = term.input
    is_index = isinstance(term.target, Tensor) and not term.target.is_floating_point()
    return (
        is_index
        and logits.numel() == output.numel()
        and torch.equal(logits.detach().flatten(), output.to(logits.dtype).flatten())
    )
