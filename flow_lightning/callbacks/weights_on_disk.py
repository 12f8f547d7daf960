"""The weights of a run on the disk: written beside its numbers, found again by a resumed run, and checked."""

from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from flow_lightning.pictures import plot_weights
from flow_lightning.report import write_metrics
from flow_lightning.token_weighting import TokenWeights
from flow_lightning.weighting import SampleWeights

WEIGHTS_FILE = "flow_weights.safetensors"


def write_weights(
    trainer: Trainer, weights: SampleWeights | TokenWeights, directory: Path, seconds: float | None
) -> None:
    """Say what the weights are like, write them, their numbers and a picture into the directory of a run, and log them.

    To be called on rank 0.

    Args:
        trainer: Gives the loggers.
        weights: The weights that the run trains with.
        directory: The run's.
        seconds: What scoring took; None for a resumed run, whose picture would be the same.
    """
    summary = weights.summary()
    unit = "samples" if isinstance(weights, SampleWeights) else "sequences, weighted by token"
    rank_zero_info(
        f"FLOW: {len(weights)} {unit}, temperature {weights.temperature:.4g}, mean weight "
        f"{summary['flow/mean_weight']:.3f}, effective sample size {summary['flow/effective_sample_size']:.0f} "
        f"({100 * summary['flow/effective_sample_fraction']:.0f} %)."
    )
    weights.save(directory / WEIGHTS_FILE)
    write_metrics(directory / "metrics.json", summary | ({} if seconds is None else {"time/scoring_s": seconds}))
    if seconds is not None:
        picture = directory / "flow_weights.png"
        plot_weights(*_some(weights), weights.temperature, picture)
        _log(trainer, weights, summary, picture)


def weights_beside(trainer: Trainer, written: dict[str, Any], weights_file: str | Path | None) -> TokenWeights:
    """Find the token weights that a checkpoint belongs to: given, where they were written, or beside the checkpoint."""
    checkpoint = Path(str(trainer.ckpt_path)).absolute()
    places = [weights_file, written["file"], checkpoint.parent / WEIGHTS_FILE, checkpoint.parent.parent / WEIGHTS_FILE]
    found = [Path(place) for place in places if place is not None and Path(place).is_file()]
    for path in found:
        weights = TokenWeights.load(path)
        if weights.digest() == written["digest"]:
            return weights
    looked = ", ".join(str(place) for place in dict.fromkeys(map(str, filter(None, places))))
    what = "is not the one that this checkpoint was trained with" if found else "is missing"
    raise FileNotFoundError(
        f"The token weights of the checkpoint {checkpoint} are in a file beside it, and that file {what}. Looked at: "
        f"{looked}. Put {WEIGHTS_FILE} of that run there, or pass FlowWeightingCallback(weights_file=...)."
    )


def verified(
    weights: SampleWeights | TokenWeights, expected: dict[str, str], where: str
) -> SampleWeights | TokenWeights:
    """Check that weights belong to the data set and the reference of this run, and that they are sound.

    Args:
        weights: From a file or a checkpoint.
        expected: Fingerprints of this run.
        where: Where the weights are from, for the message.

    Raises:
        ValueError: The message says what changed.
    """
    what = {
        "dataset": "the training data set (its samples, targets or transforms)",
        "reference": "the pre-trained model",
    }
    changed = [what[key] for key, value in expected.items() if weights.fingerprint.get(key) != value]
    if changed:
        raise ValueError(
            f"{where} holds weights that do not belong to this run: {' and '.join(changed)} changed since they were "
            "computed. Restore what they were computed from (a module with random parts needs the same seed), or start "
            "a new run without it."
        )
    weights.verify()
    return weights


def _some(weights: SampleWeights | TokenWeights, most: int = 1_000_000) -> tuple[Tensor, Tensor]:
    """Return losses and weights for a picture, evenly spaced ones if there are very many."""
    step = -(-weights.losses.numel() // most)
    return weights.losses[::step].float(), weights.weights[::step]


def _log(trainer: Trainer, weights: SampleWeights | TokenWeights, summary: dict[str, float], picture: Path) -> None:
    """Log the numbers to every logger, and the distribution to those that draw."""
    for logger in trainer.loggers:
        logger.log_metrics(summary, step=0)
        experiment: Any = getattr(logger, "experiment", None)
        if hasattr(experiment, "add_histogram"):
            losses, shown = _some(weights)
            experiment.add_histogram("flow/weights", shown.cpu(), 0)
            experiment.add_histogram("flow/losses", torch.log10(losses.clamp_min(1e-8)), 0)
        elif hasattr(logger, "log_image"):
            logger.log_image("flow/weights", [str(picture)])
