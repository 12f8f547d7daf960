"""A linear probe for a model whose head is new: multinomial logistic regression on cached features.

A new head is random, so its losses say nothing about the pre-trained model (all are near log C). The probe is solved to
convergence on features that are extracted once; its losses take their place.
Source: paper, vision protocol, step 1; the authors train the head by SGD over the images instead.

In: features, targets, weights. Out: `Probe`: head and losses. Next: `weights.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flow_lightning.method.flow import flow_weights, temperature
from flow_lightning.method.label_errors import label_issues, of_labels, stratified_parts, thresholds, true_classes
from flow_lightning.method.ridge import ridge_probabilities

#: L2 penalties to choose from, strongest first, on features of zero mean and unit scale and the mean loss.
STRENGTHS = tuple(10.0**exponent for exponent in (1, 0.5, 0, -0.5, -1, -1.5, -2, -2.5, -3, -3.5, -4, -5))
_SOLVER: dict[str, Any] = {"max_iter": 500, "tolerance_change": 1e-8, "history_size": 20}
#: The solver stops at this largest element of the gradient; rough solutions, at a share of the root of the penalty, in
#: half the steps. Weak penalties need it smaller, or they would overfit less than they do in the end.
_EXACT, _ROUGH = 1e-5, 3e-3
_ROWS = 65_536
#: What `Probe` has of each sample, but `issues`.
_OF_SAMPLES = ("losses", "entropies", "targets", "predicted", "confidences", "right")


@dataclass
class LinearHead:
    """Weight `[C, D]` and bias `[C]` of a linear classifier, float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Compute logits `[n, C]` of features `[n, D]`."""
        return F.linear(features, self.weight, self.bias)


@dataclass
class Probe:
    """A fitted linear probe.

    Attributes:
        head: The head, for features as they are.
        losses: Its cross-entropy on every sample, `[n]`: out of fold if `folds` were asked for, else in sample.
        strength: The L2 penalty that validation chose.
        validation: Mean loss on the held-out fifth and its standard error, nats, by strength, solved roughly.
        entropies: The entropy of its probabilities on every sample, `[n]`, in nats.
        issues: Whether the label of a sample looks wrong, `[n]` bool, see `label_issues`.
        targets: The given labels, class indices `[n]`.
        predicted: The most likely class of each sample, `[n]`, by the same probabilities as the losses.
        confidences: Their probability, `[n]`.
        right: The probability that each label is right, `[n]`, see `right_labels`; empty without folds.
        probabilities: Of all classes, out of fold, `[n, C]`; None without folds. Files do not have them.
        classes: Of the true classes, given the labels, `[n, C]`, see `true_classes`; None without folds.
    """

    head: LinearHead
    losses: Tensor
    strength: float
    validation: dict[float, tuple[float, float]]
    entropies: Tensor
    issues: Tensor
    targets: Tensor
    predicted: Tensor
    confidences: Tensor
    right: Tensor = field(default_factory=lambda: torch.zeros(0))
    probabilities: Tensor | None = None
    classes: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return what is small of it as tensors, to be written to a file."""
        numbers = {"strength": self.strength, "validation": [(s, *found) for s, found in self.validation.items()]}
        exact = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        of_samples = {name: each for name in _OF_SAMPLES if len(each := getattr(self, name))}
        of_samples["issues"] = self.issues.to(torch.uint8)
        return {"weight": self.head.weight, "bias": self.head.bias, **of_samples, **exact}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Probe":
        """Make a probe from what `tensors` returned; files of earlier versions have only the losses."""
        validation = {strength: (loss, error) for strength, loss, error in tensors["validation"].tolist()}
        head = LinearHead(tensors["weight"], tensors["bias"])
        found: dict[str, Any] = {name: tensors.get(name, torch.zeros(0)) for name in _OF_SAMPLES}
        found["issues"] = tensors.get("issues", torch.zeros(0)).bool()
        return cls(head, strength=tensors["strength"].item(), validation=validation, **found)


def fit_probe(
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    folds: int = 0,
    strengths: Sequence[float] = STRENGTHS,
    device: torch.device | str = "cpu",
    weights: Tensor | None = None,
    on_step: Callable[[], Any] = lambda: None,
    rounds: int = 1,
    corrected: bool = False,
) -> Probe:
    """Choose the strength of the penalty on a held-out fifth (`strongest_within_one_error`), then solve on all samples.

    Args:
        features: `[n, D]`, in memory or memory-mapped; moved to the device in blocks.
        targets: Class indices, `[n]`.
        num_classes: C.
        folds: 0: the losses are those of the probe on its own training samples, as in the paper. k > 1: they are those
            of k probes, each on the samples that it was not fitted on.
        strengths: L2 penalties to try, strongest first.
        device: Where to solve.
        weights: Weights of the samples in the mean losses that are minimised and held out, `[n]`; by default all 1.
        on_step: Called after each of the `len(strengths) + folds + 1` solutions of a round at most, for a progress bar.
        rounds: 2, with folds: solve all again, with FLOW's weights of the first round's losses. Wrong labels have less
            part in such a probe, so it tells better which they are. Only the head stays that of the first round: it is
            the better one to start a training from.
        corrected: With folds: the head is solved in the end on `classes`, the probabilities of the true classes, in
            place of the targets. All else stays that of the targets, of probes that are solved roughly.

    Raises:
        ValueError: If features are not finite, a target is out of range, there are fewer samples than folds, or
            `corrected` or a second round come without folds.
    """
    _check(features, targets, num_classes, folds)
    if (corrected or rounds > 1) and not folds:
        raise ValueError("A corrected head and a second round need losses out of fold. Set folds, to 5 for instance.")
    given = torch.ones(len(targets)) if weights is None else weights.float()
    problem = _Problem(features, targets, given, num_classes, device)
    problem.rough = corrected
    probe = _fit(problem, folds, strengths, on_step, None)
    for _ in range(rounds - 1):
        problem.weights = given * flow_weights(probe.losses, temperature(probe.losses))
        probe = _fit(problem, folds, strengths, on_step, probe.head)
    if probe.probabilities is not None:
        parts = stratified_parts(targets, folds)
        other = ridge_probabilities(problem.blocks, parts, targets, problem.weights, num_classes)
        probe.classes, _ = true_classes((probe.probabilities + other) / 2, targets)
        probe.right = of_labels(probe.classes, targets)
        if corrected:
            problem.goals, problem.weights, problem.rough = probe.classes, given, False
            solved = _fit(problem, 0, strengths, on_step, None)
            probe.head, probe.strength = solved.head, solved.strength
    return probe


def _fit(
    problem: "_Problem", folds: int, strengths: Sequence[float], on_step: Callable[[], Any], head: LinearHead | None
) -> Probe:
    """Fit the probe of one round; see `fit_probe`. A head that is given stays."""
    targets = problem.targets
    parts = stratified_parts(targets, folds or 5)
    validation = _held_out_losses(problem, parts == 0, strengths, on_step)
    strength = strongest_within_one_error(validation)
    head = head or problem.solve(torch.ones(len(targets), dtype=torch.bool), strength)
    on_step()
    asked = [] if folds else [(head, torch.arange(len(targets)))]  # heads, and the samples that they are asked about
    for fold in range(folds):
        asked.append((problem.solve(parts != fold, strength), (parts == fold).nonzero().flatten()))
        on_step()
    probabilities = torch.empty(len(targets), problem.num_classes) if folds else None
    losses, *others = _answers(problem, asked, probabilities)
    probe = Probe(head, losses, strength, validation, *others)
    probe.probabilities = probabilities
    return probe


def _answers(
    problem: "_Problem", asked: Sequence[tuple[LinearHead, Tensor]], probabilities: Tensor | None
) -> tuple[Tensor, ...]:
    """Ask heads about some samples each, as in `Probe`; `probabilities` `[n, C]`, if given, are filled in."""
    features, targets, device = problem.features, problem.targets, problem.device
    losses, entropies, issues, confidences = torch.empty(4, len(targets)).unbind()
    predicted = torch.empty(len(targets), dtype=torch.long)
    for head, rows in asked:
        for block, logits in _logits(head, features, rows, device):
            losses[block] = F.cross_entropy(logits, targets[block].to(device), reduction="none").cpu()
            shares = logits.softmax(1).cpu()
            entropies[block] = torch.special.entr(shares).sum(1)
            confidences[block], predicted[block] = shares.max(1)
            if probabilities is not None:
                probabilities[block] = shares
    sure = thresholds(losses, targets, problem.num_classes)
    for head, rows in asked:
        for block, logits in _logits(head, features, rows, device):
            issues[block] = label_issues(logits.cpu(), targets[block], sure).float()
    return losses, entropies, issues.bool(), targets.clone(), predicted, confidences


def strongest_within_one_error(validation: dict[float, tuple[float, float]]) -> float:
    """Choose the strongest penalty whose held-out loss is within one standard error of the best (Breiman et al., 1984).

    The weights of FLOW need losses that still tell easy samples from hard ones. At the penalty with the lowest held-out
    loss nearly all training losses have often collapsed to 0. One that is no worse, for all that the held-out samples
    can tell, keeps them apart. `validation` has, by strength, the mean held-out loss and its standard error.

    >>> strongest_within_one_error({1.0: (0.46, 0.03), 0.1: (0.26, 0.04), 0.01: (0.22, 0.05)})
    0.1
    """
    best, error = min(validation.values())
    return max(strength for strength, (loss, _) in validation.items() if loss <= best + error)


@torch.no_grad()
def head_losses(head: LinearHead, features: Tensor, targets: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Compute the cross-entropy of a head on cached features, `[n]`, float32, on the CPU."""
    blocks = _logits(head, features, torch.arange(len(features)), device)
    losses = [F.cross_entropy(logits, targets[rows].to(device), reduction="none").cpu() for rows, logits in blocks]
    return torch.cat(losses)


def _logits(
    head: LinearHead, features: Tensor, rows: Tensor, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some rows and their logits, block by block."""
    head = LinearHead(head.weight.to(device), head.bias.to(device))
    for block in rows.split(_ROWS):
        with torch.no_grad():
            logits = head(features[block].to(device).float())
        yield block, logits


class _Problem:
    """Logistic regression on standardised features: the mean of each feature, and one scale for all.

    With one scale the penalty means the same for every body. A scale for each feature would let the head lean on
    features that hardly vary: its large weights there send large gradients into the body, and fine-tuning forgets more.
    """

    def __init__(
        self, features: Tensor, targets: Tensor, weights: Tensor, num_classes: int, device: torch.device | str
    ) -> None:
        self.features, self.targets, self.weights, self.rough = features, targets, weights, False
        self.goals = targets  #: of the cross-entropy: class indices, or probabilities of classes `[n, C]`
        self.num_classes, self.device = num_classes, device
        total, square = 0.0, 0.0
        for block in features.split(_ROWS):
            total, square = total + block.double().sum(0), square + block.double().square().sum(0)
        mean = torch.as_tensor(total) / len(features)
        variance = torch.as_tensor(square) / len(features) - mean.float().double().square()
        self.mean, self.scale = mean.float(), float(variance.clamp_min(0).mean().sqrt()) or 1.0

    def solve(self, chosen: Tensor, strength: float, head: LinearHead | None = None, rough: bool = False) -> LinearHead:
        """Minimise `weighted mean cross-entropy + strength / 2 * |W|^2` on `chosen` samples, by L-BFGS from `head`."""
        weight = torch.zeros(self.num_classes, len(self.mean), device=self.device)
        bias = torch.zeros(self.num_classes, device=self.device)
        if head is not None:
            weight.copy_(head.weight * self.scale)
            bias.copy_(head.bias + head.weight @ self.mean)
        rows = chosen.nonzero().flatten()
        resident = list(self.blocks(rows)) if len(rows) <= _ROWS else None
        total_weight = float(self.weights[chosen].double().sum().clamp_min(1e-30))
        parameters = [weight.requires_grad_(), bias.requires_grad_()]
        stop = max(_EXACT, _ROUGH * min(1.0, strength**0.5)) if rough or self.rough else _EXACT
        optimizer = torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe", tolerance_grad=stop, **_SOLVER)

        def objective() -> Tensor:
            optimizer.zero_grad()
            total = 0.5 * strength * weight.square().sum()
            total.backward()
            for x, y, w in resident or self.blocks(rows):
                loss = (w * F.cross_entropy(F.linear(x, weight, bias), y, reduction="none")).sum() / total_weight
                loss.backward()
                total = total + loss.detach()
            return total.detach()

        with torch.enable_grad():
            optimizer.step(objective)
        plain = weight.detach().cpu() / self.scale
        return LinearHead(plain, bias.detach().cpu() - plain @ self.mean)

    def blocks(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield standardised features, goals and weights of some rows on the device, block by block."""
        mean = self.mean.to(self.device)
        for chosen in rows.split(_ROWS):
            x = (self.features[chosen].to(self.device).float() - mean) / self.scale
            yield x, self.goals[chosen].to(self.device), self.weights[chosen].to(self.device)


def _held_out_losses(
    problem: _Problem, held_out: Tensor, strengths: Sequence[float], on_step: Callable[[], Any]
) -> dict[float, tuple[float, float]]:
    """Follow the penalties from strong to weak, each from the last solution, until held-out loss has risen twice."""
    features, goals = problem.features[held_out], problem.goals[held_out]
    weights = problem.weights[held_out].double()
    total = weights.sum().clamp_min(1e-30)
    validation: dict[float, tuple[float, float]] = {}
    head: LinearHead | None = None
    for strength in strengths:
        head = problem.solve(~held_out, strength, head, rough=True)
        losses = head_losses(head, features, goals, problem.device).double()
        mean = (weights * losses).sum() / total
        error = (weights * (losses - mean)).square().sum().sqrt() / total  # for weights of 1, std / sqrt(n)
        validation[strength] = (float(mean), float(error))
        on_step()
        if sum(loss > min(validation.values())[0] for loss, _ in list(validation.values())[-2:]) == 2:
            break
    return validation


def _check(features: Tensor, targets: Tensor, num_classes: int, folds: int) -> None:
    if len(features) == 0:
        raise ValueError("There are no features: the training set is empty. Check its path and its split.")
    for start, block in enumerate(features.split(_ROWS)):
        if len(wrong := (~torch.isfinite(block).all(dim=1)).nonzero().flatten()):
            shown = (wrong[:10] + start * _ROWS).tolist()
            raise ValueError(
                f"Features of samples {shown} are NaN or infinite. Score in 32-bit precision, or look there."
            )
    if targets.min() < 0 or targets.max() >= num_classes:
        raise ValueError(
            f"Targets are {int(targets.min())} to {int(targets.max())}; expected targets from 0 to {num_classes - 1}. "
            "Set model.num_classes to the number of classes of the data set."
        )
    if folds == 1 or folds < 0 or folds > len(targets):
        raise ValueError(f"folds is {folds} for {len(targets)} samples; expected 0 (in sample) or 2 to {len(targets)}.")
