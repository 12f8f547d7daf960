"""Whether weights belong to the model and the data of a fit, and whether they mean something.

In: weights, module, loader. Out: an error or a warning that names the fix. Next: `callbacks/flow_weighting.py`.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from flow_lightning.method.flow import OUT_OF_FOLD
from flow_lightning.method.weights import SampleWeights, TokenWeights
from flow_lightning.scoring.kinds import Kind, ProbeFeatures
from flow_lightning.scoring.step_kinds import StepLosses
from flow_lightning.scoring.store import PARTS

#: Losses above this part of log(classes) are taken for those of a head that knows nothing.
_CHANCE = 0.95
#: Losses below this part of it are those of a head that has been trained.
_KNOWS = 0.5

Weights = SampleWeights | TokenWeights


def check_origin(weights: Weights, expected: dict[str, str], where: str) -> None:
    """Refuse weights of another data set or pre-trained model, and unsound ones."""
    changed = [PARTS[key] for key, value in expected.items() if weights.fingerprint.get(key) != value]
    if changed:
        raise ValueError(
            f"{where} holds weights of another run: {' and '.join(changed)} changed since they were computed. Restore "
            "it (a module with random parts needs the same seed), or start a new run."
        )
    weights.verify()


def in_words(weights: Weights, summary: dict[str, float]) -> str:
    """Say in one line which weights a fit trains with."""
    unit = "samples" if isinstance(weights, SampleWeights) else "sequences, weighted by token"
    rule = "FLOW" if weights.weighting == "flow" else f"Weights by {weights.weighting}"
    tau = "" if weights.weighting in OUT_OF_FOLD else f"temperature {weights.temperature:.4g}, "
    return (
        f"{rule}: {len(weights)} {unit}, {tau}mean weight "
        f"{summary['flow/mean_weight']:.3f}, effective sample size {summary['flow/effective_sample_size']:.0f} "
        f"({100 * summary['flow/effective_sample_fraction']:.0f} %)."
    )


def warn_if_fine_tuned(origin: str, reference: str) -> None:
    """Tell that the reference of a fit is a model that a FLOW run of another reference, the origin, has fine-tuned."""
    if origin != reference:
        rank_zero_warn(
            "This module was loaded from a checkpoint of a FLOW run, so its parameters are fine-tuned, and a new fit "
            "takes them as its reference. To continue that run, use trainer.fit(..., ckpt_path=...); to start again "
            "from the pre-trained model, build the module anew."
        )


def warn_if_new(module: LightningModule, kind: Kind, losses: torch.Tensor) -> None:
    """Tell that losses say nothing: at best those of an even guess among the classes, or of a layer that is new."""
    if isinstance(kind, ProbeFeatures):
        return
    mean, classes = float(losses.mean()), kind.classes if isinstance(kind, StepLosses) else 0
    chance, layer = math.log(max(classes, 1)), fresh_layer(module)
    if classes and mean > _CHANCE * chance:
        why = f"The mean loss {mean:.3g} is no better than chance among {classes} classes: if the head is new"
    elif layer and not mean < _KNOWS * chance:
        why = f"The pre-trained checkpoint had no layer {layer}: if it has not been trained since"
    else:
        return
    rank_zero_warn(
        f"{why}, its losses say nothing about the pre-trained model. Add flow_lightning.LinearProbeCallback(), which "
        "solves the head first."
    )


def fresh_layer(module: nn.Module) -> str:
    """Return the name of a layer that the checkpoints of timm or transformers in a module cannot have had, or nothing.

    timm says how many classes its checkpoint has, transformers which class of model wrote it.

    Example:
        >>> fresh_layer(nn.Linear(2, 2))
        ''
    """
    known: set[int] = set().union(*map(_pretrained, module.modules()))
    for name, layer in module.named_modules():
        own = _ids(layer)
        if known and own and not own & known:
            return str(name)
    return ""


def _pretrained(part: Any) -> set[int]:
    """Return the parameters of a model of timm or transformers that its checkpoint has; none of other modules."""
    config, transformers = getattr(part, "pretrained_cfg", None), sys.modules.get("transformers")
    if isinstance(config, Mapping) and hasattr(part, "get_classifier"):
        head = part.get_classifier() if config.get("num_classes") != part.num_classes else None
        return _ids(part) - (_ids(head) if isinstance(head, nn.Module) else set())
    if transformers is not None and isinstance(part, transformers.PreTrainedModel) and part.config.architectures:
        return _ids(part if type(part).__name__ in part.config.architectures else part.base_model)
    return set()


def _ids(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


def check_length(loader: Any, scored: int) -> None:
    """Refuse a training loader with another number of samples than were scored."""
    dataset = getattr(loader, "dataset", None)
    if dataset is not None and len(dataset) != scored:
        raise ValueError(
            f"{scored} samples were scored but the training set has {len(dataset)}: both loaders must hold the same "
            "samples in the same order. Split and wrap the data set once, in setup()."
        )


def check_drawn(index: torch.Tensor, scored: int) -> None:
    """Refuse samples that were not scored: of a sampler that knows others, or of a data set that has grown."""
    least, greatest = map(int, index.aminmax()) if index.numel() else (0, 0)
    if greatest >= scored or least < -scored:
        unknown = greatest if greatest >= scored else least
        raise ValueError(
            f"The sampler of the training loader drew sample {unknown}, but {scored} samples were scored. Keep "
            "the data set as it is during a fit, and let the sampler draw from it alone."
        )
