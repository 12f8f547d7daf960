"""Every loss of `torch.nn.functional`: weighted where it is called, it is the formula of its own elements."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flow_lightning.method.interception import LOSSES, Interception

B, C = 6, 4
WEIGHTS = torch.linspace(0.2, 1.0, B)
CLASSES = torch.tensor([0, 1, 2, 3, 1, 0])
SIGNS = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
MATRIX_OF_SIGNS = SIGNS[:, None] * torch.tensor([1.0, -1.0, 1.0, -1.0])
NUMBERS = torch.arange(B * C).view(B, C).remainder(7) / 7

#: By the name of a loss: a call of it on outputs `[B, C]`, with keywords to come.
CALLS: dict[str, Callable[..., Tensor]] = {
    "binary_cross_entropy": lambda x, **k: F.binary_cross_entropy(x.sigmoid(), NUMBERS, **k),
    "binary_cross_entropy_with_logits": lambda x, **k: F.binary_cross_entropy_with_logits(x, NUMBERS, **k),
    "cosine_embedding_loss": lambda x, **k: F.cosine_embedding_loss(x, NUMBERS + 1, SIGNS, **k),
    "cross_entropy": lambda x, **k: F.cross_entropy(x, CLASSES, **k),
    "ctc_loss": lambda x, **k: F.ctc_loss(
        x.view(B, 2, 2).log_softmax(2).transpose(0, 1), torch.ones(B, 1).long(), (2,) * B, (1,) * B, **k
    ),
    "gaussian_nll_loss": lambda x, **k: F.gaussian_nll_loss(x, NUMBERS, NUMBERS + 1, **k),
    "hinge_embedding_loss": lambda x, **k: F.hinge_embedding_loss(x, MATRIX_OF_SIGNS, **k),
    "huber_loss": lambda x, **k: F.huber_loss(x, NUMBERS, **k),
    "kl_div": lambda x, **k: F.kl_div(x.log_softmax(1), NUMBERS, **k),
    "l1_loss": lambda x, **k: F.l1_loss(x, NUMBERS, **k),
    "linear_cross_entropy": lambda x, **k: F.linear_cross_entropy(x, torch.eye(C), CLASSES, **k),
    "margin_ranking_loss": lambda x, **k: F.margin_ranking_loss(x[:, 0], x[:, 1], SIGNS, **k),
    "mse_loss": lambda x, **k: F.mse_loss(x, NUMBERS, **k),
    "multi_margin_loss": lambda x, **k: F.multi_margin_loss(x, CLASSES, **k),
    "multilabel_margin_loss": lambda x, **k: F.multilabel_margin_loss(
        x, torch.cat([CLASSES[:, None], torch.full((B, C - 1), -1)], 1), **k
    ),
    "multilabel_soft_margin_loss": lambda x, **k: F.multilabel_soft_margin_loss(x, NUMBERS.round(), **k),
    "nll_loss": lambda x, **k: F.nll_loss(x.log_softmax(1), CLASSES, **k),
    "poisson_nll_loss": lambda x, **k: F.poisson_nll_loss(x, NUMBERS, **k),
    "smooth_l1_loss": lambda x, **k: F.smooth_l1_loss(x, NUMBERS, **k),
    "soft_margin_loss": lambda x, **k: F.soft_margin_loss(x, MATRIX_OF_SIGNS, **k),
    "triplet_margin_loss": lambda x, **k: F.triplet_margin_loss(x, NUMBERS, NUMBERS.flip(0), **k),
    "triplet_margin_with_distance_loss": lambda x, **k: F.triplet_margin_with_distance_loss(
        x, NUMBERS, NUMBERS.flip(0), **k
    ),
}
OWN = torch.tensor([1.0, 2.0, 0.5, 3.0])  # weights of classes
IS_KEPT = (CLASSES != 1).float()
#: A loss, further keywords, and what each sample adds to the denominator of its mean.
VARIANTS: dict[str, tuple[str, dict[str, Any], Tensor]] = {
    "ignored class": ("cross_entropy", {"ignore_index": 1}, IS_KEPT),
    "class weights": ("cross_entropy", {"weight": OWN}, OWN[CLASSES]),
    "all at once": (
        "cross_entropy",
        {"weight": OWN, "ignore_index": 1, "label_smoothing": 0.2},
        OWN[CLASSES] * IS_KEPT,
    ),
    "nll": ("nll_loss", {"weight": OWN, "ignore_index": 1}, OWN[CLASSES] * IS_KEPT),
}


def outputs() -> Tensor:
    return torch.randn(B, C, generator=torch.Generator().manual_seed(0)).requires_grad_()


def weighed(call: Callable[..., Tensor], weights: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    x = outputs()
    with Interception(B, weights) as seen:
        loss = call(x, **settings)
    assert seen.weighed == 1
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), gradient


def test_none_of_torchs_losses_is_left_out() -> None:
    assert set(CALLS) >= {function.__name__ for function in LOSSES}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", [function.__name__ for function in LOSSES])
def test_a_loss_is_the_formula_of_its_own_elements(name: str, reduction: str) -> None:
    call, x = CALLS[name], outputs()
    own = call(x, reduction=reduction)
    torch.testing.assert_close(
        weighed(call, torch.ones(B), reduction=reduction), (own.detach(), *torch.autograd.grad(own.sum(), x))
    )
    x = outputs()
    elements = call(x, reduction="none")
    product = WEIGHTS.view(B, *[1] * (elements.ndim - 1)) * elements
    by_hand = {"mean": product.sum() / elements.numel(), "sum": product.sum(), "none": product}[reduction]
    torch.testing.assert_close(
        weighed(call, WEIGHTS, reduction=reduction), (by_hand.detach(), *torch.autograd.grad(by_hand.sum(), x))
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_the_denominator_of_a_mean_stays_what_it_was(name: str) -> None:
    loss, settings, counts = VARIANTS[name]
    x = outputs()
    by_hand = (WEIGHTS * CALLS[loss](x, reduction="none", **settings)).sum() / counts.sum()
    torch.testing.assert_close(
        weighed(CALLS[loss], WEIGHTS, **settings), (by_hand.detach(), *torch.autograd.grad(by_hand, x))
    )


def test_deprecated_ways_to_name_a_reduction_are_understood() -> None:
    for settings, reduction in (
        ({"size_average": False}, "sum"),
        ({"reduce": False}, "none"),
        ({"reduce": True}, "mean"),
    ):
        old = weighed(CALLS["mse_loss"], WEIGHTS, **settings)
        torch.testing.assert_close(old, weighed(CALLS["mse_loss"], WEIGHTS, reduction=reduction))


def test_other_calls_of_torch_and_losses_without_the_batchs_dimension_are_as_they_were() -> None:
    x = outputs()
    with Interception(B, WEIGHTS) as seen:
        assert torch.equal(x.softmax(1), x.clone().softmax(1))
        loss = F.mse_loss(x[:5], NUMBERS[:5])
    assert torch.equal(loss, F.mse_loss(x[:5], NUMBERS[:5]))
    assert seen.weighed == 0 and seen.left_alone == {"mse_loss": (5, C)}
