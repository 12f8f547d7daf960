"""All that a resumed fit needs to end as the unbroken one: loader, random numbers, position of the loops.

In: seed, epoch, a checkpoint. Out: the batches, dropout and steps of the unbroken run. Next: `lightning_internals.py`.
"""

import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from flow_lightning.data.position import LoaderPosition
from flow_lightning.data.tracking import stop_watching, watch_training_loader
from flow_lightning.distributed import data_rank
from flow_lightning.lightning_internals import end_restart, restore_loader_state


class ResumableSampler(DistributedSampler[int]):
    """Shuffle a data set by seed and epoch alone, and start anywhere in it.

    Args:
        dataset: Its `set_epoch`, if it has one, is called with the epoch.
        num_replicas: Number of processes. Each gets equally many samples, some twice if need be.
        rank, seed: Number of this process, and the seed of all of them.
    """

    def __init__(self, dataset: Any, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed)
        self.start = (0, 0)  # an epoch, and how many samples of this process it leaves out once, as they had their turn

    def order(self) -> Tensor:
        """Return the positions of all samples, in the order of this epoch, before processes share them: `[n]`."""
        return torch.randperm(len(self.dataset), generator=self.generator())  # type: ignore[arg-type]

    def generator(self) -> torch.Generator:
        """Return the source of this epoch's order."""
        return torch.Generator().manual_seed(self.seed + self.epoch)

    def __iter__(self) -> Iterator[int]:
        order, start, self.start = self.order(), self.position(), (0, 0)
        # Repeated samples come last, so that the steps before are those of one process with the same batches.
        mine = torch.arange(self.rank, self.total_size, self.num_replicas)[start:] % len(order)
        return iter(order[mine].tolist())

    def position(self) -> int:
        """Return how many samples of this process the next iteration leaves out."""
        epoch, count = self.start
        return count if epoch == self.epoch else 0

    def set_epoch(self, epoch: int) -> None:
        """Tell sampler and data set which epoch it is: random transforms may depend on it."""
        super().set_epoch(epoch)
        if callable(of_dataset := getattr(self.dataset, "set_epoch", None)):
            of_dataset(epoch)


class ResumableDataLoader(DataLoader[Any]):
    """A DataLoader over a `ResumableSampler` that Lightning restores in mid-epoch: no batch twice, none left out."""

    _served = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = self.sampler.position() if isinstance(self.sampler, ResumableSampler) else 0
        self._served = start // (self.batch_size or 1)
        for batch in super().__iter__():
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of which epoch have been served."""
        epoch = self.sampler.epoch if isinstance(self.sampler, ResumableSampler) else 0
        return {"batches": self._served % len(self), "epoch": epoch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Start that epoch after the batches that were served; the next one, if it was over, at its beginning."""
        self._served = state_dict["batches"]
        if isinstance(self.sampler, ResumableSampler):
            self.sampler.start = (state_dict["epoch"], state_dict["batches"] * (self.batch_size or 1))


class LoopRepairs(Callback):
    """Mend what Lightning's loops forget in a resumed fit; `WeightedLossModule` brings it along.

    - The training loader starts at its beginning if `configure_optimizers` used `estimated_stepping_batches`.
      See https://github.com/Lightning-AI/pytorch-lightning/issues/20550.
    - With `max_steps`, a checkpoint of an epoch's end starts an epoch without batches.
      See https://github.com/Lightning-AI/pytorch-lightning/issues/19617.
    - A checkpoint of an epoch's last batch starts an epoch that is not counted as begun.
    - A checkpoint of a fit that `max_steps` has ended leaves out the rest of the epoch.
    - A `ReduceLROnPlateau` misses the metric of the epoch in which the fit resumes.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the loader its position, and finish or begin an epoch as the unbroken run would."""
        restore_loader_state(trainer)
        fit_loop: Any = trainer.fit_loop
        epochs, epoch_loop = fit_loop.epoch_progress, fit_loop.epoch_loop
        vars(epoch_loop).pop("run", None)  # of an earlier fit that failed here
        done = epoch_loop.batch_progress.current
        if epochs.current.processed == epochs.current.ready:  # between two epochs
            for count in (epochs.current, epochs.total):
                count.completed = count.processed
            fit_loop.reset_restart_stage()
            if not epoch_loop.restarted_on_train_batch_end:
                end_restart(trainer)
        elif fit_loop.restarted_mid_epoch and epoch_loop.batch_progress.is_last_batch and done.ready == done.completed:
            epoch_loop.run = partial(_end_epoch, trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the loops that the resumed run is under way."""
        end_restart(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the batches of a validation that is done anew from 0."""
        validation = trainer.fit_loop.epoch_loop.val_loop
        if validation.restarted_mid_evaluation:
            validation.batch_progress.total.reset()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take an epoch that `max_steps` has cut short for one that goes on: for Lightning it is over."""
        batches, loops = trainer.fit_loop.epoch_loop.batch_progress, checkpoint["loops"]["fit_loop"]
        is_at_end = batches.is_last_batch or batches.current.ready >= trainer.num_training_batches
        if 0 < trainer.max_steps <= trainer.global_step and not is_at_end:
            for count in loops["epoch_progress"].values():
                count["processed"] = count["completed"] = count["ready"] - 1


def _end_epoch(trainer: Trainer, data_fetcher: Any) -> None:
    """Do what is left of an epoch whose batches are all done: a validation, if one is due and was not done."""
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    del epoch_loop.run
    limit = trainer.limit_val_batches
    if not epoch_loop.val_loop.restarted_mid_evaluation:
        trainer.limit_val_batches = 0  # it was done
    epoch_loop.on_advance_end(data_fetcher)
    trainer.limit_val_batches = limit
    end_restart(trainer)


class ExactResumeCallback(LoopRepairs):
    """Make a fit that was killed, at any time and several times, end as the unbroken one, to the last bit.

    Every checkpoint, whoever writes it (`ModelCheckpoint`, `trainer.save_checkpoint`), carries the position after the
    last optimizer step, so no half-accumulated gradient is lost. A resumed fit runs an epoch's end that was not
    reached. Dropout depends on seed, epoch, batch and rank alone.

    It needs the same seed in each run (`seed_everything`), and one training loader: of a map-style data set, or with a
    position of its own as `ResumableDataLoader`. The order of a plain `DataLoader` then follows seed and epoch alone:
    torch, numpy and python are seeded before each batch. A resumed fit whose first batches differ stops with a
    RuntimeError. Not restored: random transforms in loader processes, metrics averaged over an epoch, and what other
    callbacks did after the checkpoint.

    Example:
        >>> from lightning import Trainer
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> checkpoint = ModelCheckpoint("runs/one", save_last=True, every_n_train_steps=100)
        >>> trainer = Trainer(callbacks=[ExactResumeCallback(), checkpoint], logger=False)
    """

    _KEY = "exact_resume"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit, and watch for the training loader."""
        self._loader = LoaderPosition()
        if stage == "fit":
            watch_training_loader(trainer, partial(self._follow, trainer))
        self._seed: int | None = None
        self._position: dict[str, Any] | None = None  # the loops' state after the last step; None: as they are
        self._step = 0
        self._buffers: dict[str, Tensor] | None = None  # as they were then; None: no batch was begun since
        self._restored: dict[str, Any] = {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take seed, position and metrics of a checkpoint."""
        self._restored = checkpoint.get(self._KEY, {})
        self._position = deepcopy(checkpoint.get("loops", {}).get("fit_loop"))
        self._seed = self._restored.get("seed")
        if self._position is not None and checkpoint["global_step"] > 0:  # a tuner loads one of step 0
            self._loader.restore(self._position, self._restored.get("samples"))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Settle the seed of the run, that of rank 0, and let schedulers see the metrics of the checkpoint."""
        super().on_train_start(trainer, pl_module)
        pl_module.run_seed = self._settle_seed(trainer)  # type: ignore[assignment]
        if not self._loader.is_followed(trainer.train_dataloader):
            self._loader.release()
        elif self._loader.start.batches:
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            if "samples" not in self._restored:
                rank_zero_warn(
                    "The checkpoint was written without ExactResumeCallback: if its epoch was shuffled, it goes on in "
                    "another order, so some samples come twice, others not at all."
                )
        epochs: Any = trainer.fit_loop.epoch_progress.current
        self._loader.epoch = lambda: epochs.processed
        self._step = trainer.global_step
        trainer.callback_metrics.update(self._restored.get("metrics", {}))
        if self._restored.get("is_plateau_due"):
            epochs.completed -= 1  # the schedulers' frequency counts the epoch that has ended
            trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
            epochs.completed += 1
        self._restored = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the position before the epoch's first batch."""
        self._note(trainer, _between_epochs(trainer.fit_loop.state_dict()))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed dropout, and keep the buffers that the batches of a step will change."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._loader.lock(True)
        torch.manual_seed(hash((self._seed, trainer.current_epoch, batch_idx, trainer.global_rank)) % 2**63)
        if self._buffers is None:
            self._buffers = {name: buffer.detach().clone() for name, buffer in pl_module.named_buffers()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the position after an optimizer step."""
        if trainer.global_step != self._step:
            self._note(trainer, _before_validation(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expect the next epoch's batches."""
        self._loader.lock(False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation after the last step is done."""
        if not trainer.sanity_checking and self._buffers is None and self._position is not None:
            self._note(trainer, trainer.fit_loop.state_dict())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the position after the last step into a checkpoint."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        loops, epoch = checkpoint["loops"], checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
        metrics = {name: value.cpu() for name, value in trainer.callback_metrics.items()}
        checkpoint[self._KEY] = {"seed": self._seed, "metrics": metrics, "is_plateau_due": False, "samples": None}
        if not epoch["ready"] == epoch["started"] == epoch["processed"] + 1:  # between two epochs
            checkpoint[self._KEY]["is_plateau_due"] = epoch["completed"] == epoch["processed"] - 1
            loops["fit_loop"] = _between_epochs(loops["fit_loop"])
            return
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if trainer.global_step != self._step and batches.processed == batches.ready:
            self._note(trainer, _before_validation(trainer))
        if trainer.global_step != self._step:
            rank_zero_warn(
                "This checkpoint is written in the middle of an optimizer step: a run that resumes from it repeats "
                "that step. Save in on_train_batch_end or later."
            )
        elif self._position is not None:
            loops["fit_loop"] = self._position
            state = checkpoint.get("current_model_state", checkpoint["state_dict"])  # the former: WeightAveraging
            state.update({name: value for name, value in (self._buffers or {}).items() if name in state})
        checkpoint[self._KEY]["samples"] = self._loader.checksum(loops["fit_loop"])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the seed back, and leave the loader as it was."""
        pl_module.run_seed = None  # type: ignore[assignment]
        self._loader.release()
        stop_watching(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the loader as it was."""
        self._loader.release()
        stop_watching(trainer)

    def _follow(self, trainer: Trainer, loader: Any, is_training: Callable[[], bool]) -> None:
        self._loader.seed, self._loader.rank = self._settle_seed(trainer), data_rank(trainer)[0]
        self._loader.follow(loader, is_training)

    def _settle_seed(self, trainer: Trainer) -> int:
        if self._seed is None:
            self._seed = trainer.strategy.broadcast(torch.initial_seed())
        return self._seed

    def _note(self, trainer: Trainer, position: dict[str, Any]) -> None:
        self._position, self._step, self._buffers = position, trainer.global_step, None
        self._loader.checksum(position)


def _between_epochs(fit_loop: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the loops such that the next epoch has not begun."""
    for count in fit_loop["epoch_progress"].values():
        count.update(dict.fromkeys(count, count["processed"]))
    return fit_loop


def _before_validation(trainer: Trainer) -> dict[str, Any]:
    """Return the state of the loops after a batch such that a validation or the epoch's end, if due, comes next.

    Lightning takes them for done: https://github.com/Lightning-AI/pytorch-lightning/issues/19815.
    """
    state = trainer.fit_loop.state_dict()
    batches, validation = state["epoch_loop.batch_progress"], state["epoch_loop.val_loop.batch_progress"]
    if batches["is_last_batch"] or _is_validation_due(trainer):
        for count in (batches["current"], batches["total"]):
            count["completed"] = count["processed"]
        # As if killed in its first batch: Lightning then runs the validation, from its beginning.
        validation["current"] = dict.fromkeys(validation["current"], 0)
        validation["total"] = validation["current"] | {"ready": 1, "started": 1}
    return state


def _is_validation_due(trainer: Trainer) -> bool:
    """Tell whether a validation follows a batch that is not the last of its epoch."""
    epochs, batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or not isinstance(batches, int):
        return False
    if epochs is None:
        return (trainer.fit_loop.total_batch_idx + 1) % batches == 0
    return (trainer.current_epoch + 1) % epochs == 0 and (trainer.fit_loop.batch_idx + 1) % batches == 0
