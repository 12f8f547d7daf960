"""The head of a new task, solved on features of the frozen body: before training, and again after it.

In: the features of `scoring/`. Out: `module.head`. Next: `flow_weighting.py`.
"""

import time
from functools import partial
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from flow_lightning.contract import data_contract, module_contract
from flow_lightning.distributed import fill, on_rank_zero
from flow_lightning.method.probe import Probe
from flow_lightning.method.weights import SampleWeights
from flow_lightning.optional import optional_import
from flow_lightning.report.label_issues import ISSUES_FILE, check_no_edits, write_label_issues
from flow_lightning.run import RunCallback
from flow_lightning.scoring.kinds import ProbeFeatures
from flow_lightning.scoring.step_kinds import StepFeatures


class LinearProbeCallback(RunCallback):
    """Fit the new head on features of the frozen body, at `on_fit_start` (paper, vision protocol, step 1).

    One pass over the training samples serves the head and, with a FlowWeightingCallback, temperature and weights.
    A module may declare `features(batch) -> [B, D]` and a `head` (`nn.Linear`), and have batches with `target`. Of any
    other module the head is the last `nn.Linear` that makes the logits of a cross-entropy in its `training_step`.

    Args:
        refit: Whether to fit the head again at `on_train_end`, on the features of the body as it is then (step 4). By
            default it does in a fit with FlowWeightingCallback, and if RetentionBudgetCallback moved the body. The
            refit weighs the samples as training did: an unweighted one learns wrong labels back. A fit that writes
            checkpoints writes the refitted model to `checkpoints/refitted.ckpt` of the run's directory; earlier
            checkpoints hold the trained head. `weighted` refits with FLOW's weights although training has none.
            `corrected`, with folds, refits on the probabilities of the true classes, see
            `flow_lightning.method.label_errors.true_classes`. They are found anew, from the given labels and the body
            as it then is, with as many folds and rounds.
        folds: 0: weigh samples by the probe's training losses, as in the paper. k > 1: by k-fold out-of-fold losses,
            if the probe overfits. `label_issues.csv` of the run's directory then says which labels look wrong.
        rounds: 2, with folds: the probe is fitted again with FLOW's weights of the first round's losses, so that wrong
            labels have less part in it. For `FlowWeightingCallback(weighting="posterior")` and a corrected refit.
        parquet: Whether to write the same table as `label_issues.parquet`, too, with numbers in full. Needs pyarrow.
        arrays: Whether to write `pred_probs.npy` `[N, C]`, out of fold, and `features.npy` `[N, D]`, float32, into the
            run's directory, with folds. They are what `cleanlab.Datalab.find_issues(pred_probs=..., features=...)`
            takes. 50,000 samples of 1,280 features take 244 MiB.
        only: Whether the probe is all: the fit ends before its first step, with the head refitted on the frozen body.
        memory_budget: Features above this many GiB go to a memory-mapped temporary file.

    Raises:
        TypeError: In the fit, if an unchanged module's `training_step` shows no head to fit. Also if a module declares
            `features` or `sample_losses`, but lacks `features` or a linear `head` with a bias.
    """

    def __init__(
        self,
        *,
        refit: bool | Literal["weighted", "corrected"] | None = None,
        folds: int = 0,
        rounds: int = 1,
        parquet: bool = False,
        arrays: bool = False,
        only: bool = False,
        memory_budget: float = 4.0,
    ) -> None:
        if rounds > 1 and not folds:
            raise ValueError(f"rounds is {rounds}, which needs out-of-fold losses. Set folds, to 5 for instance.")
        if refit == "corrected" and folds < 2:
            raise ValueError("refit='corrected' needs probabilities out of fold. Set folds, to 5 for instance.")
        if (arrays or parquet) and folds < 2:
            name = "arrays" if arrays else "parquet"
            raise ValueError(f"{name} is about probabilities out of fold. Set folds, to 5 for instance.")
        self.refit, self.folds, self.rounds, self.arrays = refit, folds, rounds, arrays
        self.issue_files = [ISSUES_FILE, "label_issues.parquet"][: 1 + parquet]
        self.only, self.memory_budget = only, memory_budget
        self.keeps_features = False  #: whether a path will need the features of the frozen body after training
        self.probe: Probe | None = None
        self.solved: Probe | None = None  #: a refit that another callback has done already, on the body that it chose
        self._refit_weights: torch.Tensor | None = None  # of a refit that is weighted where training is not

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an unsuitable module now, not after hours of training, and say what is to be scored."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if len(self.issue_files) > 1:
            optional_import("pyarrow.parquet", "language", "Parquet files")
        self.probe = self.solved = self._refit_weights = None
        self.keeps_features = False
        self._kind = self._features(pl_module, self.folds, "Linear probe")
        self._kind.rounds = self.rounds
        self.run.scoring.choose(self._kind)
        self.run.scoring.look_at_model()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the head; a resumed fit finds the head in its checkpoint."""
        if self.run.resumed:
            return
        started = time.perf_counter()
        if (folder := self.run.directory) is not None and self.folds:
            on_rank_zero(trainer, lambda: check_no_edits(*(folder / name for name in self.issue_files)))
        self._kind.arrays, self._kind.keeps_features = folder if self.arrays else None, self.keeps_features
        self.probe = Probe.from_tensors(self.run.scoring.scored())
        self._install(self.probe, self._kind.description)
        if folder is not None and self.folds and len(self.probe.right):  # files of earlier versions lack it
            names = data_contract(trainer).class_names
            for name in self.issue_files:
                on_rank_zero(trainer, partial(write_label_issues, folder / name, self.probe, names))
            issues = f"{int(self.probe.issues.sum()):,} of {len(self.probe.issues):,} labels look wrong"
            rank_zero_info(f"{issues}: {folder / ISSUES_FILE}")
        if self._kind.arrays is not None and trainer.is_global_zero:  # nothing was solved
            rank_zero_warn("Arrays were not written: a weights_file has losses, but no features. Delete it.")
        if self.refit == "weighted":
            self._refit_weights = SampleWeights.from_losses(self.probe.losses).weights
        metrics = {"probe/strength": self.probe.strength, "probe/mean_loss": float(self.probe.losses.double().mean())}
        self.run.record(trainer, metrics | {"time/probe_s": time.perf_counter() - started})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the fit before its first step, if the probe is all."""
        if self.only:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of the refit, which a resumed fit cannot compute any more."""
        return {} if self._refit_weights is None else {"refit_weights": self._refit_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the weights of a checkpoint."""
        self._refit_weights = state_dict.get("refit_weights")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit the head again, if asked to, with the weights of the fit."""
        weights: Any = module_contract(pl_module).sample_weights
        if not (weights is not None or self.run.is_body_moved if self.refit is None else self.refit):
            return
        started = time.perf_counter()
        if (probe := self.solved) is None:
            probe = self.solve(pl_module)
        else:
            self._install(probe, "Head refit")
        if trainer.checkpoint_callback is not None and self.run.directory is not None:
            trainer.save_checkpoint(self.run.directory / "checkpoints" / "refitted.ckpt", weights_only=False)
        seconds = time.perf_counter() - started
        self.run.record(trainer, {"refit/strength": probe.strength, "time/refit_s": seconds})

    def solve(
        self, module: LightningModule, loader: DataLoader[Any] | None = None, is_pretrained: bool = False
    ) -> Probe:
        """Fit the head on the features of the body as it is now, with weights or corrected labels, and put it in.

        Args:
            module: The model.
            loader: Reads the training samples, in place of the fit's own.
            is_pretrained: Whether the body is the one from before training, whose features may have been kept.
        """
        weights: Any = module_contract(module).sample_weights
        if self.refit == "corrected":
            kind = self._features(module, self.folds, "Head refit")
            kind.rounds, kind.corrected = self.rounds, True
        else:
            kind = self._features(module, 0, "Head refit")
            kind.sample_weights = self._refit_weights if weights is None else weights.weights.cpu()
        found, self._kind.found = self._kind.found if is_pretrained else None, None
        probe = Probe.from_tensors(self.run.scoring.scored_now(kind, loader, found))
        self._kind.head = kind.head  # a resumed fit has not looked for it yet
        self._install(probe, kind.description)
        return probe

    def _features(self, module: LightningModule, folds: int, description: str) -> ProbeFeatures:
        """Return what is to be scored: the features that the module declares, else those in its training step."""
        contract = module_contract(module)
        if contract.features is None and contract.sample_losses is None:
            return StepFeatures(folds, self.memory_budget, description)
        head = contract.head
        if contract.features is None or not isinstance(head, torch.nn.Linear):
            raise TypeError(
                f"{type(module).__name__} cannot be probed: it needs features(batch) -> [B, D] and a head (nn.Linear), "
                "as ImageClassificationModule has. Without a new head no probe is needed: leave LinearProbeCallback "
                "out."
            )
        if head.bias is None:
            raise TypeError("The head has no bias, which the probe fits too. Give the model a head with bias=True.")
        kind = ProbeFeatures(head.out_features, folds, self.memory_budget, description)
        kind.head, kind.new_parts = head, tuple(f"{name}." for name, part in module.named_modules() if part is head)
        return kind

    def _install(self, probe: Probe, description: str) -> None:
        """Put the probe into the module's head."""
        head: Any = self._kind.head
        fill(head.weight, probe.head.weight)
        fill(head.bias, probe.head.bias)
        rank_zero_info(
            f"{description}: {len(probe.losses)} samples, L2 strength {probe.strength:.3g}, "
            f"mean loss {probe.losses.mean():.4f}."
        )


def probes_of(trainer: Trainer) -> list[LinearProbeCallback]:
    """Return the probes of a fit."""
    return [each for each in trainer.callbacks if isinstance(each, LinearProbeCallback)]  # type: ignore[attr-defined]
