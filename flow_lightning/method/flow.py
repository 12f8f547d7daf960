"""The formula of FLOW, here and nowhere else.

In: losses of the frozen model. Out: temperature and weights. Next: `weights.py`.

Source: Sanyal et al., "Upweighting Easy Samples in Fine-Tuning Mitigates Forgetting", ICML 2025 (arXiv 2502.02797),
Algorithm 1: `w_i = exp(-l_i / tau)`, tau the median of the losses.
"""

import math
from collections.abc import Callable

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


#: Rules by name, from losses and temperature (for `threshold`: the bound) to weights. A rule of your own goes in here.
WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {"flow": flow_weights, "threshold": keep_below}


def weighting_rule(name: str) -> Callable[[Tensor, float], Tensor]:
    """Return the weighting rule of a name; a ValueError if there is none."""
    if name not in WEIGHTINGS:
        raise ValueError(
            f"weighting is {name!r}; expected one of {sorted(WEIGHTINGS)}. Add a rule of your own to "
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
