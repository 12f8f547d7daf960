"""The formula of FLOW, here and nowhere else.

In: losses of the frozen model. Out: temperature and weights. Next: `weights.py`.

Source: Sanyal et al., "Upweighting Easy Samples in Fine-Tuning Mitigates Forgetting", ICML 2025 (arXiv 2502.02797),
Algorithm 1: `w_i = exp(-l_i / tau)`, tau the median of the losses.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

_BLOCK = 2**20
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def temperature(losses: Tensor, quantile: float = 0.5) -> float:
    """Compute the temperature tau, in the unit of the losses: their median, or another quantile of them.

    Quantiles interpolate linearly between neighbours, as `numpy.quantile` does.

    Args:
        losses: Losses of the frozen pre-trained model, `[n]`.
        quantile: In `[0, 1]`; 0.5 is the paper's choice and leaves the method without a knob.

    Raises:
        ValueError: If losses are missing, not finite or negative, or if the temperature comes out as 0.

    >>> temperature(torch.tensor([0.0, 0.25, 0.75, 4.0]))
    0.5
    """
    check_losses(losses)
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(f"quantile is {quantile}; expected a number from 0 to 1 (0.5 is the median).")
    position = quantile * (losses.numel() - 1)
    lower, upper = _ranked(losses, [math.floor(position), math.ceil(position)])
    tau = lower + (upper - lower) * (position - math.floor(position))
    if tau == 0.0:
        zeros = int((losses == 0).sum())
        raise ValueError(
            f"The temperature is 0: {zeros} of {losses.numel()} losses are exactly 0, so the model (or the probe) fits "
            "these samples perfectly. Use a more strongly regularised probe or out-of-fold losses (folds=5), "
            "a higher quantile, or set the temperature yourself."
        )
    return tau


def mixture_temperature(losses: Tensor) -> float:
    """Compute the temperature as the median loss of the part of the samples that looks clean.

    Two normal distributions are fitted to the losses by expectation and maximisation. A sample counts as clean if it
    comes more likely from the one with the smaller mean (Li et al., "DivideMix", arXiv 2002.07394).

    Args:
        losses: Losses of the frozen pre-trained model, `[n]`.

    Raises:
        ValueError: As in `temperature`.

    >>> mixture_temperature(torch.tensor([0.1, 0.2, 0.3, 0.2, 5.0, 5.1]))
    0.20000000298023224
    """
    check_losses(losses)
    x = losses.detach().double().cpu().flatten()[:, None]
    mean = torch.stack([x.quantile(0.25), x.quantile(0.75)]) if len(x) < 2**24 else torch.stack([x.min(), x.max()])
    floor = 1e-6 * x.var(unbiased=False) + 1e-12
    variance, share = x.var(unbiased=False).expand(2) + floor, torch.full((2,), 0.5, dtype=torch.float64)
    clean = torch.zeros(len(x), dtype=torch.bool)
    for _ in range(200):
        joint = share.log() - 0.5 * variance.log() - 0.5 * (x - mean).square() / variance
        part, before = joint.softmax(1), clean
        total = part.sum(0).clamp_min(1e-12)
        mean, share = (part * x).sum(0) / total, total / len(x)
        variance = (part * (x - mean).square()).sum(0) / total + floor
        clean = part[:, mean.argmin()] > 0.5
        if torch.equal(clean, before):
            break
    return temperature(losses.flatten()[clean.to(losses.device)] if clean.any() else losses.flatten())


def flow_weights(losses: Tensor, temperature: float) -> Tensor:
    """Compute the weights `w_i = exp(-l_i / tau)` of losses of any shape, in `[0, 1]`, float32 in any precision.

    Raises:
        ValueError: If the temperature, in the unit of the losses, is not a positive finite number.

    >>> flow_weights(torch.tensor([0.0, 0.5, 5.0]), temperature=0.5)
    tensor([1.0000e+00, 3.6788e-01, 4.5400e-05])
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a positive finite number, in the unit of the losses.")
    return (losses.detach().float() / -temperature).exp_()


def keep_below(losses: Tensor, bound: float) -> Tensor:
    """Keep what the pre-trained model finds likely enough: weight 1 where the loss is below the bound, else 0.

    On token losses this is selective token masking, another rule in the place of `flow_weights`. Losses have any shape,
    the bound is in their unit, the weights are float32.

    >>> keep_below(torch.tensor([0.1, 2.0, 3.5]), 2.5)
    tensor([1., 1., 0.])
    """
    return (losses.detach().float() < bound).float()


def constant(losses: Tensor, value: float) -> Tensor:
    """Give every loss the same weight, float32: with FLOW's mean weight this is the small-step control of FLOW.

    >>> constant(torch.tensor([0.1, 2.0]), 0.5)
    tensor([0.5000, 0.5000])
    """
    return torch.full_like(losses.detach().float(), value)


Rule = Callable[[Tensor, float], Tensor]
#: Rules by name, from losses and temperature (for `threshold`: the bound) to weights. A rule of your own goes in here.
WEIGHTINGS: dict[str, Rule] = {"flow": flow_weights, "threshold": keep_below, "mean": constant}
#: Rules that need more of a linear probe than its losses: what that is in the probe's result, and in words.
OF_PROBE = {"excess": "entropies", "drop": "issues", "posterior": "right"}
_PROBE_WORDS = {"entropies": "entropies", "issues": "label issues", "right": "probabilities that labels are right"}
#: Rules that ask whether a label is right: a probe that was not fitted on it, or a language model with two prompts.
OUT_OF_FOLD = ("drop", "posterior")


def parameter_of(
    losses: Tensor, weighting: str, given: float | Literal["mixture"] | None = None, quantile: float = 0.5
) -> float:
    """Return the number that a rule takes beside the losses: tau, or for `mean` FLOW's mean weight at that tau."""
    if given == "mixture":
        tau = mixture_temperature(losses)
    else:
        tau = temperature(losses, quantile) if given is None else float(given)
    return float(flow_weights(losses, tau).double().mean()) if weighting == "mean" else tau


def weights_by(weighting: str, losses: Tensor, parameter: float, beside: Mapping[str, Tensor]) -> Tensor:
    """Compute weights by the rule of a name, `[n]` float32, from losses and what a probe gives `beside` them.

    `excess` is `exp(-max(0, l - H) / tau)`, H the model's own entropy on the sample: what it expects to be unsure of
    is not made to weigh less. `drop` is 0 for samples whose label is an issue, see `label_issues`, and 1 for all
    others. `posterior` is the probability that a label is right, see `right_labels`; tau plays no part in it.

    Raises:
        ValueError: If there is no such rule, or it needs a probe that there is not.

    >>> beside = {"entropies": torch.tensor([0.5, 0.5])}
    >>> weights_by("excess", torch.tensor([0.4, 1.5]), 1.0, beside)
    tensor([1.0000, 0.3679])
    """
    needed = OF_PROBE.get(weighting)
    if needed is None:
        return weighting_rule(weighting)(losses, parameter)
    if needed not in beside:
        raise ValueError(
            f"weighting={weighting!r} needs a linear probe's {_PROBE_WORDS[needed]}. Add LinearProbeCallback(folds=5); "
            "a weights_file of an earlier version must be deleted."
        )
    if weighting == "drop":
        return (beside["issues"] == 0).float()
    if weighting == "posterior":
        return beside["right"].clone()  # a file has both
    return flow_weights((losses - beside["entropies"].to(losses)).clamp_min(0), parameter)


def weighting_rule(name: str) -> Rule:
    """Return the weighting rule of a name; a ValueError if there is none."""
    if name not in WEIGHTINGS:
        raise ValueError(
            f"weighting is {name!r}; expected one of {sorted([*WEIGHTINGS, *OF_PROBE])}. Add a rule of your own to "
            "flow_lightning.method.flow.WEIGHTINGS."
        )
    return WEIGHTINGS[name]


def summarise(weights: Tensor, temperature: float) -> dict[str, float]:
    """Return temperature, mean weight, effective sample size and quantiles, under their keys in `metrics.json`."""
    ess, n = effective_sample_size(weights), weights.numel()
    quantiles = _ranked(weights, [round(q * (n - 1)) for q in _QUANTILES])
    return {
        "flow/temperature": temperature,
        "flow/mean_weight": float(weights.sum(dtype=torch.float64)) / n,
        "flow/effective_sample_size": ess,
        "flow/effective_sample_fraction": ess / n,
    } | {f"flow/weight_q{round(100 * q):02d}": value for q, value in zip(_QUANTILES, quantiles)}


def effective_sample_size(weights: Tensor) -> float:
    """Compute Kish's effective sample size, `(sum w)^2 / sum w^2`: n for equal weights, 1 if one sample has them all.

    >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    2.0
    """
    square = sum(float(block.double().square().sum()) for block in weights.flatten().split(_BLOCK))
    return float(weights.sum(dtype=torch.float64)) ** 2 / square if square > 0 else 0.0


def _ranked(values: Tensor, ranks: list[int]) -> list[float]:
    """Return the values at some ranks of the ascending order, without sorting all of them."""
    flat = values.detach().float().cpu().flatten().numpy()
    return [float(value) for value in np.partition(flat, ranks)[ranks]]


def check_losses(losses: Tensor) -> None:
    """Refuse losses that are missing, NaN, infinite or negative with a ValueError, which names the samples."""
    if losses.numel() == 0:
        raise ValueError("There are no losses: the data set is empty. Check its path and its split.")
    least, most = losses.aminmax()  # NaN if any loss is
    if least >= 0 and torch.isfinite(most):
        return
    for name, wrong, fix in (
        ("NaN or infinite", ~torch.isfinite(losses), "Look for broken inputs, or score in 32-bit precision."),
        ("negative", losses < 0, "FLOW needs losses >= 0, such as cross-entropy or squared error."),
    ):
        if wrong.any():
            indices = wrong.flatten().nonzero().flatten()
            shown = ", ".join(str(int(i)) for i in indices[:10]) + (", ..." if indices.numel() > 10 else "")
            raise ValueError(f"{indices.numel()} of {losses.numel()} losses are {name}: samples {shown}. {fix}")
