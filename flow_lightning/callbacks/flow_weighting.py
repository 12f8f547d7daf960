"""FLOW as a callback: weights from the frozen pre-trained model, before the first step."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from flow_lightning.callbacks.caching import open_store, remembered
from flow_lightning.callbacks.linear_probe import LinearProbeCallback, head_names
from flow_lightning.callbacks.run_directory import (
    begin_run,
    claim_run,
    from_rank_zero,
    is_trained,
    on_rank_zero,
    release_run,
    run_directory,
)
from flow_lightning.callbacks.sweep import ragged_sweep, scoring_dataloader, sweep
from flow_lightning.callbacks.weights_on_disk import WEIGHTS_FILE, verified, weights_beside, write_weights
from flow_lightning.fingerprint import dataset_fingerprint, is_random, model_fingerprint
from flow_lightning.indexing import check_map_style
from flow_lightning.score_store import ScoreStore
from flow_lightning.scoring import evaluation
from flow_lightning.token_weighting import TokenWeights
from flow_lightning.weighting import SampleWeights, check_losses, weighting_rule

#: Where a checkpoint of a FLOW run says which reference its weights came from.
_REFERENCE = "flow_reference"


@dataclass
class _State:
    """All that changes during a fit."""

    weights: SampleWeights | TokenWeights | None = None
    written: dict[str, Any] | None = None  # what a checkpoint says of token weights, which are in a file beside it
    resumed: bool = False  # the model is fine-tuned already
    settled: bool = False  # the weights are those to train with, and written down
    reference: str = ""  # fingerprint of the model as it was built, before any checkpoint was restored
    checkpoint: str = ""  # fingerprint of the model in the checkpoint of a resumed fit
    seconds: float = 0.0  # that scoring took


class FlowWeightingCallback(Callback):
    """Weigh each training sample by `exp(-l / tau)`, l its loss under the frozen pre-trained model (FLOW, Algorithm 1).

    At `on_fit_start` it scores the training set once, each sample exactly once over all ranks, computes temperature and
    weights, and hands them to the module, whose training loss they weigh (see `WeightedLossModule`). After a
    LinearProbeCallback it takes the probe's losses instead of a second look at the data. The model, the random
    number generators and the order of the batches are as without it.

    It writes `flow_weights.safetensors`, `flow_weights.png` and the `flow/` keys of `metrics.json` into the run's
    directory. A resumed fit scores nothing and trains on the weights of its checkpoint; it draws no picture. Only under
    strategies that restore a checkpoint after `on_fit_start` (sharded ones) does it take the losses from the cache, or
    score, before it knows that checkpoint.

    Args:
        per: What gets a weight of its own: each `sample` (of text: each sequence, by its mean loss), or each supervised
            `token` of a language model.
        weighting: The rule from losses to weights: `flow`, or `threshold`, which keeps what has a loss below
            `temperature` (on tokens: selective token masking); see `flow_lightning.weighting.WEIGHTINGS`.
        temperature: tau, in the unit of the loss; by default a quantile of the losses.
        quantile: Which quantile of the losses is the temperature; 0.5, the median, is the paper's choice.
        dataloader: Where the samples to score come from, if neither data module nor module has `scoring_dataloader()`
            or `train_dataloader()`. Its data set, in the same order, must be the one that is trained on.
        weights_file: Weights to use instead of scoring: a `flow_weights.safetensors` of the same data set.
        cache: Whether losses are kept for later fits on the same model, data and transforms, in
            `$FLOW_LIGHTNING_CACHE` (by default ~/.cache/flow_lightning), or the folder where. An interrupted scoring
            goes on from there.
        force: Whether to score anew and replace what is in the cache.
    """

    def __init__(
        self,
        temperature: float | None = None,
        quantile: float = 0.5,
        dataloader: DataLoader[Any] | None = None,
        weights_file: str | Path | None = None,
        per: Literal["sample", "token"] = "sample",
        weighting: str = "flow",
        cache: bool | str | Path = True,
        force: bool = False,
    ) -> None:
        if per not in ("sample", "token"):
            raise ValueError(f"per is {per!r}; expected 'sample' or 'token'.")
        weighting_rule(weighting)
        if temperature is not None and not temperature > 0:
            raise ValueError(
                f"temperature is {temperature}; expected a positive number, or None for a quantile of the losses."
            )
        self.temperature = temperature
        self.quantile = quantile
        self.dataloader = dataloader
        self.weights_file = weights_file
        self.per = per
        self.weighting = weighting
        self.cache = cache
        self.force = force
        self._state = _State()

    @property
    def weights(self) -> SampleWeights | TokenWeights | None:
        """Losses, temperature and weights, from `on_fit_start` on."""
        return self._state.weights

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked before anything is computed, and take the fingerprint of the reference."""
        if stage != "fit":
            return
        if not callable(getattr(pl_module, "sample_losses", None)):
            raise TypeError(
                f"{type(pl_module).__name__} has no sample_losses(batch) -> Tensor [B]. Derive it from "
                "flow_lightning.WeightedLossModule and define that one method."
            )
        if self.per == "token" and not callable(getattr(pl_module, "token_losses", None)):
            raise TypeError(
                f"{type(pl_module).__name__} has no token_losses(batch) -> Tensor [K], so its tokens cannot be "
                "weighted. Use CausalLanguageModule, or per='sample'."
            )
        _check_order(trainer, self)
        claim_run(trainer, pl_module)
        self._state = _State()
        self._state.reference = _reference(trainer, pl_module)
        _warn_if_fine_tuned(pl_module, self._state.reference)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the weights, or take them from the checkpoint, and hand them to the module."""
        begin_run(trainer, self._state.resumed)
        if self._state.resumed:
            self._resume(trainer, pl_module)
            return
        if not self._state.reference:  # its parts were made in configure_model
            self._state.reference = _reference(trainer, pl_module)
        loader = self._loader(trainer, pl_module)
        check_map_style(loader.dataset)
        started = time.perf_counter()
        with evaluation(pl_module):
            _warn_if_random(loader.dataset)
        fingerprint = self._fingerprint(trainer, pl_module)
        if self.weights_file is not None:
            weights = self._of_file(trainer, fingerprint)
        else:
            weights = self._score(trainer, pl_module, loader, fingerprint)
        self._state.seconds = time.perf_counter() - started
        self._take(pl_module, weights)
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._settle(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take restored weights under strategies that restore late, and check that they fit the data trained on."""
        if not self._state.settled:
            if self._state.resumed:
                self._resume(trainer, pl_module)
            else:
                self._settle(trainer)
        weights: Any = pl_module.sample_weights
        _check_length(trainer, len(weights))
        weights.lookups = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Refuse to train on without weights."""
        if self._state.weights is not None and self._state.weights.lookups == 0:
            raise RuntimeError(
                f"{type(pl_module).__name__}.training_step did not look up a weight, so its loss is not weighted. "
                "Return `self.weighted_loss(batch, self.sample_losses(batch))`, or leave training_step to "
                "WeightedLossModule."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the weights back: a later fit without this callback is plain training."""
        if stage == "fit":
            self._give_back(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do the same when the fit has failed."""
        self._give_back(trainer, pl_module)

    def _give_back(self, trainer: Trainer, module: LightningModule) -> None:
        module.sample_weights = None  # type: ignore[assignment]
        release_run(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the reference, so that the fine-tuned model cannot be mistaken for it later."""
        checkpoint[_REFERENCE] = self._state.reference

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notice a resumed fit, and take the fingerprint of the model in its checkpoint."""
        self._state.resumed |= is_trained(checkpoint)
        self._state.checkpoint = model_fingerprint(checkpoint.get("state_dict", {}), _new_parts(trainer, pl_module))

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs: losses, weights, temperature, fingerprint; token weights: where they are."""
        weights = self._state.weights
        if isinstance(weights, TokenWeights):
            return dict(self._state.written or {})
        return {} if weights is None else weights.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the weights of a checkpoint, or remember where they are."""
        if "digest" in state_dict:
            self._state.written, self._state.weights = state_dict, None
        elif state_dict:
            self._state.weights = SampleWeights(**state_dict)

    def _loader(self, trainer: Trainer, module: LightningModule) -> DataLoader[Any]:
        return self.dataloader if self.dataloader is not None else scoring_dataloader(trainer, module)

    def _fingerprint(self, trainer: Trainer, module: LightningModule) -> dict[str, str]:
        with evaluation(module):
            dataset = dataset_fingerprint(self._loader(trainer, module).dataset)
        return {"dataset": dataset, "reference": self._state.reference}

    def _of_file(self, trainer: Trainer, expected: dict[str, str]) -> SampleWeights | TokenWeights:
        path = Path(str(self.weights_file))
        load = TokenWeights.load if self.per == "token" else SampleWeights.load
        return verified(from_rank_zero(trainer, lambda: load(path)), expected, f"The file {path}")

    def _score(
        self, trainer: Trainer, module: LightningModule, loader: DataLoader[Any], fingerprint: dict[str, str]
    ) -> SampleWeights | TokenWeights:
        settings: Any = (self.temperature, self.quantile, fingerprint, self.weighting)
        probe = next((c.probe for c in trainer.callbacks if isinstance(c, LinearProbeCallback)), None)  # type: ignore[attr-defined]
        if probe is not None and self.per == "sample":
            return SampleWeights.from_losses(probe.losses, *settings)
        score = _token_losses if self.per == "token" else _losses
        store = open_store(
            trainer, module, loader, ("losses", self.per), self.cache, self.force, _new_parts(trainer, module)
        )
        found = remembered(trainer, store, "FLOW", lambda: score(trainer, module, loader, store))
        if self.per == "token":
            return TokenWeights.from_losses(found["losses"], found["offsets"], *settings)
        return SampleWeights.from_losses(found["losses"], *settings)

    def _resume(self, trainer: Trainer, module: LightningModule) -> None:
        """Check the weights of the checkpoint against the data set and the reference of this run, and take them."""
        where, weights = f"The checkpoint {trainer.ckpt_path}", self._state.weights
        expected = self._fingerprint(trainer, module)
        if not self._state.reference or self._state.reference == self._state.checkpoint:
            del expected["reference"]  # made in configure_model, or by load_from_checkpoint: no pre-trained one is here
        written, given = self._state.written, self.weights_file
        if weights is None and written is not None:
            weights = from_rank_zero(trainer, lambda: weights_beside(trainer, written, given))
        if weights is None and given is not None:
            weights = self._of_file(trainer, expected)
        if weights is None:
            raise RuntimeError(
                f"{where} holds no FLOW weights, and its model is not the pre-trained one, so they cannot be computed "
                "from it. Resume a run that had FlowWeightingCallback, or pass "
                "FlowWeightingCallback(weights_file=...)."
            )
        self._take(module, verified(weights, expected, where))
        self._settle(trainer)

    def _take(self, module: LightningModule, weights: SampleWeights | TokenWeights) -> None:
        """Hand the weights to the module."""
        self._state.weights = weights
        module.sample_weights = weights  # type: ignore[assignment]

    def _settle(self, trainer: Trainer) -> None:
        """Say and write down which weights the fit trains with."""
        state, directory = self._state, run_directory(trainer)
        state.settled = True
        weights: Any = state.weights
        if isinstance(weights, TokenWeights):
            state.written = {"file": str((directory / WEIGHTS_FILE).absolute()), "digest": weights.digest()}
        seconds = None if state.resumed else state.seconds
        on_rank_zero(trainer, lambda: write_weights(trainer, weights, directory, seconds))


def _reference(trainer: Trainer, module: LightningModule) -> str:
    """Return the fingerprint of the pre-trained model; none of a module whose parts are made in configure_model."""
    state = module.state_dict()
    return model_fingerprint(state, _new_parts(trainer, module)) if state else ""


def _losses(
    trainer: Trainer, module: LightningModule, loader: DataLoader[Any], store: ScoreStore | None
) -> dict[str, Tensor]:
    def look(batch: Any) -> tuple[Tensor]:
        losses = module.sample_losses(batch)  # type: ignore[operator]
        if losses.ndim != 1:
            raise ValueError(
                f"sample_losses(batch) gave shape {tuple(losses.shape)}; expected one loss per sample, [B] "
                "(reduction='none')."
            )
        return (losses.float(),)

    with _frozen_reference(module):
        (losses,) = sweep(trainer, module, loader, look, "FLOW: scoring", store=store)
    check_losses(losses)  # before they are kept
    return {"losses": losses}


def _token_losses(
    trainer: Trainer, module: Any, loader: DataLoader[Any], store: ScoreStore | None
) -> dict[str, Tensor]:
    def look(batch: Any) -> tuple[Tensor, Tensor]:
        return (batch["labels"][:, 1:] != -100).sum(dim=1), module.token_losses(batch)

    with _frozen_reference(module):
        losses, offsets = ragged_sweep(trainer, module, loader, look, "FLOW: scoring tokens", store)
    check_losses(losses)
    return {"losses": losses, "offsets": offsets}


def _frozen_reference(module: Any) -> AbstractContextManager[None]:
    """Let the pre-trained model speak where the module has parts, such as adapters, that are not in it."""
    reference = getattr(module, "frozen_reference", None)
    return reference() if callable(reference) else nullcontext()


def _new_parts(trainer: Trainer, module: LightningModule) -> tuple[str, ...]:
    """Return the names of what is made anew in each run and fitted by the probe: they are no part of the reference."""
    if not any(isinstance(callback, LinearProbeCallback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return tuple(getattr(module, "new_parts", ()))
    return head_names(module)


def _check_order(trainer: Trainer, callback: FlowWeightingCallback) -> None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(later, LinearProbeCallback) for later in callbacks[callbacks.index(callback) :]):
        raise ValueError(
            "LinearProbeCallback must stand before FlowWeightingCallback in the Trainer's callbacks: "
            "weights come from the probe."
        )


def _warn_if_fine_tuned(module: LightningModule, reference: str) -> None:
    origin = getattr(module, "flow_reference", None)
    if origin is not None and origin != reference:
        rank_zero_warn(
            "This module was loaded from a checkpoint of a FLOW run, so its weights are fine-tuned ones, and a new fit "
            "takes them as its reference. To go on with that run, use trainer.fit(..., ckpt_path=...); to start again "
            "from the pre-trained model, build the module anew; to keep the old weights, pass "
            "FlowWeightingCallback(weights_file=...)."
        )


def _warn_if_random(dataset: Any) -> None:
    if is_random(dataset):
        rank_zero_warn(
            "The samples to score change from one reading to the next: their transforms are random, so the weights "
            "come from one random draw. Define `scoring_dataloader()` on the data module: the training samples with "
            "evaluation transforms."
        )


def _check_length(trainer: Trainer, scored: int) -> None:
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    if dataset is not None and len(dataset) != scored:
        raise ValueError(
            f"{scored} samples were scored but the training set has {len(dataset)}: the scoring and the training "
            "loader must hold the same samples in the same order. Split and wrap the data set once, in setup(), not in "
            "each *_dataloader()."
        )
