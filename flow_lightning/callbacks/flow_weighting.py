"""FLOW as a callback: weights from the frozen pre-trained model, before the first step.

In: the losses of `scoring/`. Out: `module.sample_weights`, and the run's files. Next: `modules/base.py`.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from flow_lightning.contract import module_contract
from flow_lightning.data.indexing import batch_index, part_of
from flow_lightning.data.position import warn_if_it_begins_anew
from flow_lightning.data.tracking import BatchTracker, stop_watching, watch_training_loader
from flow_lightning.distributed import from_rank_zero, on_rank_zero
from flow_lightning.lightning_internals import iterates_anew
from flow_lightning.method.flow import OF_PROBE, OUT_OF_FOLD, weighting_rule
from flow_lightning.method.interception import LOSSES
from flow_lightning.method.weights import SampleWeights, TokenWeights
from flow_lightning.modules.weighted_step import SampleLossFunction, WeightedStep
from flow_lightning.run import RunCallback
from flow_lightning.scoring.fingerprint import join_fingerprints, model_fingerprints
from flow_lightning.scoring.kinds import Kind, MatchedLosses, ProbeFeatures, SampleLosses, TokenLosses
from flow_lightning.scoring.samples import check_trained_data
from flow_lightning.scoring.soundness import (
    Weights,
    check_drawn,
    check_length,
    check_origin,
    in_words,
    warn_if_fine_tuned,
    warn_if_new,
)
from flow_lightning.scoring.step_kinds import StepLosses

WEIGHTS_FILE = "flow_weights.safetensors"
#: Where a checkpoint of a FLOW run says which reference its weights came from.
REFERENCE_KEY = "flow_reference"


class FlowWeightingCallback(RunCallback):
    """Weigh each training sample by `exp(-l / tau)`, l its loss under the frozen pre-trained model (FLOW, Algorithm 1).

    At `on_fit_start` it scores the training set, each sample exactly once over all ranks, and computes temperature and
    weights. In training they weigh the losses of `training_step`. With a LinearProbeCallback, before or after it in the
    list, it takes the probe's losses from the same pass. The model, the random number generators and the order of the
    batches are as without it.

    It writes `flow_weights.safetensors`, `flow_weights.png` and the `flow/` keys of `metrics.json` into the run's
    directory. A resumed fit scores nothing: the weights are in its checkpoint.

    Args:
        per: What gets a weight of its own: each `sample` (of text: each sequence, by its mean loss), or each supervised
            `token` of a language model.
        weighting: The rule from losses to weights: `flow`, or `threshold`, which keeps what has a loss below
            `temperature` (on tokens: selective token masking). `mean` gives all samples FLOW's mean weight: a control.
            With a LinearProbeCallback also `excess`, the loss above the model's own entropy. `posterior` is the
            probability that a label is right, `drop` leaves out samples whose label looks wrong, see
            `flow_lightning.method.flow.weights_by`. With a language model these two need no probe: a label is right if
            a response belongs to its prompt. Scoring then reads it after another sample's prompt, too, see
            `flow_lightning.method.matching`.
        temperature: tau, in the unit of the loss; by default a quantile of the losses. `mixture` takes the median of
            those that look clean, for data with many wrong labels, see `flow_lightning.method.flow`.
        quantile: Which quantile of the losses is the temperature; 0.5, the median, is the paper's choice.
        scoring_dataset: The training samples as they are to be scored, in the same order, without augmentation, say:
            a data set, or a DataLoader, which also gives batch size and workers. By default `scoring_dataloader()` of
            the data module, or the data set that is trained on.
        weights_file: A `.safetensors` file. It is used if it is there and still true: data set and model have the same
            fingerprint, and a few batches, scored anew, give the same losses. Otherwise the samples are scored, block
            by block, and it is written; an interrupted scoring continues from its finished blocks.
        sample_losses: Gives one loss per sample, `[B]`, of `(module, batch)`; the fit then minimises `mean(w l)` of
            them, and `training_step` is not called. Where it is not given, the losses are those of `training_step`: of
            a `sample_losses(batch)` of the module, else of `torch.nn.functional`, as the step calls them.
        loss: The name of the loss in `training_step` that is scored and weighted, such as "cross_entropy", if it has
            several and the others are not to be. By default all that have the batch's dimension.
        loader: The key, or the number, of the loader whose samples are scored and weighted, if the fit has several.

    Raises:
        ValueError: If an argument has a value that does not exist.
    """

    def __init__(
        self,
        *,
        per: Literal["sample", "token"] = "sample",
        weighting: str = "flow",
        temperature: float | Literal["mixture"] | None = None,
        quantile: float = 0.5,
        scoring_dataset: Any = None,
        weights_file: str | Path | None = None,
        sample_losses: SampleLossFunction | None = None,
        loss: str | None = None,
        loader: str | int | None = None,
    ) -> None:
        if per not in ("sample", "token"):
            raise ValueError(f"per is {per!r}; expected 'sample' or 'token'.")
        if weighting not in OF_PROBE:
            weighting_rule(weighting)
        elif per == "token":
            raise ValueError(f"weighting={weighting!r} is of whole samples. Use per='sample'.")
        if temperature not in (None, "mixture") and not (isinstance(temperature, int | float) and temperature > 0):
            raise ValueError(
                f"temperature is {temperature}; expected a positive number, 'mixture', or None for a quantile."
            )
        if loss is not None and loss not in {function.__name__ for function in LOSSES}:
            raise ValueError(f"loss is {loss!r}; expected the name of a loss of torch.nn.functional, or None for all.")
        self.sample_losses, self.loss, self.loader = sample_losses, loss, loader
        self.per, self.weighting, self.temperature, self.quantile = per, weighting, temperature, quantile
        self.scoring_dataset = scoring_dataset
        self.weights_file = None if weights_file is None else Path(weights_file)
        self.weights: Weights | None = None
        self._is_settled, self._seconds = False, 0.0
        self._of_checkpoint: dict[str, str] = {}
        self._tracker = BatchTracker()
        self._step: WeightedStep | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked before anything is computed, and take the fingerprint of the reference."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self.weights, self._is_settled, self._of_checkpoint = None, False, {}
        scoring = self.run.scoring
        scoring.file, scoring.given, scoring.key = self.weights_file, self.scoring_dataset, self.loader
        scoring.choose(self._kind(pl_module))
        scoring.new_parts += tuple(module_contract(pl_module).new_parts)
        scoring.look_at_model()
        watch_training_loader(trainer, self._tracker.follow)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notice a resumed fit, and take the fingerprint of the model in its checkpoint."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._of_checkpoint = model_fingerprints(checkpoint.get("state_dict", {}))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the weights, or take them from the checkpoint, and hand them to the module."""
        if self.run.resumed:
            self._resume(trainer, pl_module)
            return
        scoring, started = self.run.scoring, time.perf_counter()
        if self.weighting in OUT_OF_FOLD and isinstance(scoring.kind, ProbeFeatures) and not scoring.kind.folds:
            raise ValueError(
                f"weighting={self.weighting!r} asks a probe about labels that it was fitted on: none looks wrong. "
                "Set LinearProbeCallback(folds=5)."
            )
        result = scoring.scored()
        if (origin := module_contract(pl_module).flow_reference) is not None:
            warn_if_fine_tuned(origin, scoring.reference)
        else:
            warn_if_new(pl_module, scoring.kind, result["losses"])
        self._take(pl_module, self._weights_from(result, scoring.fingerprint))
        self._seconds = time.perf_counter() - started
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._settle(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take restored weights under strategies that restore late, and check that they fit the data trained on."""
        if not self._is_settled:
            if self.run.resumed:
                self._resume(trainer, pl_module)
            else:
                self._settle(trainer)
        loader = part_of(trainer.train_dataloader, self.loader)
        check_length(loader, len(cast(Weights, self.weights)))
        self._tracker.begin(loader, self.run.resumed)
        warn_if_it_begins_anew(trainer)
        kind, weights_of = self.run.scoring.kind, partial(self._weights_of, pl_module)
        alone = kind.alone if isinstance(kind, StepLosses) else None
        self._step = WeightedStep(trainer, pl_module, weights_of, self.loss, self.sample_losses, alone)
        self._step.install()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the loader of this epoch, made anew perhaps; refuse one of other samples than those scored."""
        loader = part_of(trainer.train_dataloader, self.loader)
        self._tracker.begin(loader, is_iterated_anew=iterates_anew(trainer))
        if self.scoring_dataset is None:
            check_trained_data(trainer, pl_module, self.run.scoring.samples, loader)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the module which samples are in a batch that carries no index."""
        if part_of(batch, self.loader) is not None:  # a shorter loader may be over
            index, weights = self._tracker.index(batch_idx), cast(Weights, self.weights)
            if index is not None:
                check_drawn(index, len(weights))
            vars(pl_module)["batch_samples"] = index

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Expect the next epoch's batches."""
        self._tracker.end_epoch()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the weights back: a later fit without this callback is plain training."""
        super().teardown(trainer, pl_module, stage)
        self._give_back(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the weights back when the fit has failed."""
        super().on_exception(trainer, pl_module, exception)
        self._give_back(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the reference, so that the fine-tuned model cannot be mistaken for it later."""
        if self.weights is not None:
            checkpoint[REFERENCE_KEY] = self.weights.fingerprint.get("reference", "")

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs: losses, weights, temperature and fingerprint."""
        return {} if self.weights is None else self.weights.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the weights of a checkpoint."""
        if state_dict:
            self.weights = (TokenWeights if "offsets" in state_dict else SampleWeights)(**state_dict)

    def _weights_of(self, module: LightningModule, batch: Any) -> torch.Tensor | None:
        """Look up the weights of a batch, `[B]` or `[K]`: by its own index, or by what the loader drew."""
        if (part := part_of(batch, self.loader)) is None:
            return None
        return cast(Weights, self.weights).of(
            batch_index(part, module_contract(module).batch_samples).to(module.device)
        )

    def _give_back(self, trainer: Trainer, module: LightningModule) -> None:
        """Leave module, loader and strategy as they were."""
        if self._step is not None:
            self._step.remove()
            self._step = None
        for name in ("sample_weights", "batch_samples"):
            vars(module).pop(name, None)
        self._tracker.release()
        stop_watching(trainer)

    def _kind(self, module: LightningModule) -> Kind:
        """Return what is to be scored of this module."""
        contract = module_contract(module)
        if self.per == "token" and contract.token_losses is None:
            raise TypeError(
                f"{type(module).__name__} has no token_losses(batch) -> Tensor [K], so its tokens cannot be weighted. "
                "Use CausalLanguageModule, or per='sample'."
            )
        if self.per == "token":
            return TokenLosses()
        if self.weighting in OUT_OF_FOLD and None not in (contract.token_losses, contract.sample_losses):
            return MatchedLosses(self.sample_losses)
        if self.sample_losses is None and contract.sample_losses is None:
            return StepLosses(self.loss, self.loader)
        return SampleLosses(self.sample_losses)

    def _weights_from(self, result: dict[str, Any], fingerprint: dict[str, str]) -> Weights:
        parts: dict[str, Any] = {name: result[name] for name in ("losses", "offsets") if name in result}
        parts |= {"beside": result} if self.weighting in OF_PROBE else {}
        temperature, is_token = self.temperature, self.per == "token"
        quantile, known = result.get("quantile", (None, None))
        if temperature is None and is_token and quantile == self.quantile:
            temperature = float(known)  # token losses are in half precision in a file: their quantile is another one
        weights = self.run.scoring.kind.weights.from_losses(
            **parts, temperature=temperature, quantile=self.quantile, fingerprint=fingerprint, weighting=self.weighting
        )
        if is_token and self.temperature is None and self.weighting != "mean":
            result["quantile"] = torch.tensor([self.quantile, weights.temperature], dtype=torch.float64)
        return weights

    def _resume(self, trainer: Trainer, module: LightningModule) -> None:
        """Check the weights of the checkpoint against the data set and the reference of this run, and take them."""
        scoring, weights, file = self.run.scoring, self.weights, self.weights_file
        where = f"The checkpoint {trainer.ckpt_path}"
        if weights is None and file is not None:
            load, where = scoring.kind.weights.load, f"The file {file}"
            weights = from_rank_zero(trainer, lambda: load(file))
        if weights is None:
            raise RuntimeError(
                f"{where} holds no FLOW weights, and its model is fine-tuned, so they cannot be computed from it. "
                "Resume a run that had FlowWeightingCallback, or pass the weights_file of such a run."
            )
        expected = scoring.fingerprint
        if expected["reference"] in ("", join_fingerprints(self._of_checkpoint, scoring.new_parts)):
            del expected["reference"]  # made in configure_model, or by load_from_checkpoint: no pre-trained one is here
        check_origin(weights, expected, where)
        self._take(module, weights)
        self._settle(trainer)

    def _take(self, module: LightningModule, weights: Weights) -> None:
        """Hand the weights to the module."""
        self.weights = weights
        vars(module)["sample_weights"] = weights

    def _settle(self, trainer: Trainer) -> None:
        """Say which weights the fit trains with, and write them down."""
        self._is_settled = True
        weights, run = cast(Weights, self.weights), self.run
        summary = weights.summary()
        rank_zero_info(in_words(weights, summary))
        run.record(trainer, summary | ({} if run.resumed else {"time/scoring_s": self._seconds}))
        if not run.resumed:
            on_rank_zero(trainer, lambda: self._draw(trainer, weights))
        kept, name = run.scoring.to_keep(), run.scoring.kind.name
        files = [run.directory and run.directory / WEIGHTS_FILE]
        files += [] if run.resumed or run.scoring.is_from_file else [self.weights_file]
        on_rank_zero(trainer, lambda: [weights.save(file, kept, name) for file in files if file is not None])
        run.scoring.forget_blocks()

    def _draw(self, trainer: Trainer, weights: Weights) -> None:
        from flow_lightning.report.loggers import log_weights  # matplotlib is slow to import
        from flow_lightning.report.pictures import plot_weights

        picture = None if self.run.directory is None else self.run.directory / "flow_weights.png"
        if picture is not None:
            plot_weights(weights, picture)
        log_weights(trainer.loggers, weights, picture)
