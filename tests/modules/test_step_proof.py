"""The proof of the first batch: it sees a millionth, and gives no false alarm where sums nearly vanish."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import flow_lightning as fl
from tests.unchanged import Classifier, data, fit


class Bent(Classifier):
    """A loss that is linear in those of its samples but for a hundred-thousandth."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1]) ** 1.00001


class Blurred(Classifier):
    """A gradient that follows the batch's own loss by a hundred-thousandth, with the loss itself right."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return loss + 1e-5 * loss.detach() * (loss - loss.detach())


@pytest.mark.parametrize("kind", [Bent, Blurred])
def test_a_loss_that_is_no_weighted_mean_by_a_hundred_thousandth_is_refused(kind: Any) -> None:
    with pytest.raises(RuntimeError, match="its loss is no weighted mean"):
        fit(kind(), data(), fl.FlowWeightingCallback())


def solved(network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], batch: list[Tensor]) -> float:
    """Minimise the loss of one batch, and return the norm of the gradient as a share of that at the start."""
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=50, line_search_fn="strong_wolfe", tolerance_change=0)
    norms: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(network(batch[0]), batch[1])
        value.backward()
        norms.append(float(torch.cat([p.grad.flatten() for p in network.parameters()]).norm()))
        return value

    for _ in range(4):
        optimizer.step(closure)
    return min(norms) / norms[0]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mse_loss": lambda: nn.Linear(4, 3),
    "cross_entropy": lambda: nn.Linear(4, 3),
    "binary_cross_entropy_with_logits": lambda: nn.Linear(4, 3),
    "huber_loss": lambda: nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_at_a_minimum_rounding_raises_no_alarm(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    targets = torch.rand(23, 3) if name != "cross_entropy" else torch.randint(3, (23,))
    batch, module = [torch.randn(23, 4), targets], Classifier(getattr(F, name))
    module.net = NETWORKS[name]()
    assert solved(module.net, module.loss, batch) < 1e-3
    flow = fl.FlowWeightingCallback()
    fit(module, None, flow, loader=DataLoader(TensorDataset(*batch), 23), max_steps=1)
    assert flow.weights is not None


def test_pixels_of_a_single_sample_cancel_without_an_alarm() -> None:
    torch.manual_seed(0)
    batch, module = [torch.randn(1, 3, 8, 8), torch.randint(3, (1, 8, 8))], Classifier()
    module.net = nn.Conv2d(3, 3, 1)
    assert solved(module.net, module.loss, batch) < 1e-4
    fit(module, None, fl.FlowWeightingCallback(), loader=DataLoader(TensorDataset(*batch), 1), max_steps=1)


def test_a_first_batch_that_is_nan_is_no_reason_to_refuse_the_module() -> None:
    class Broken(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (torch.nan if self.training else 1.0)

    assert fit(Broken(), data(), fl.FlowWeightingCallback(), max_steps=1).global_step == 1


class Tokens(Classifier):
    """Has losses of tokens, one for each sample, but does not look their weights up."""

    def token_losses(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    def token_counts(self, batch: Any) -> Tensor:
        return torch.ones(len(batch[1]), dtype=torch.long)


def test_weights_of_tokens_that_are_not_looked_up_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"does not look up the weights of its tokens.*per='sample'"):
        fit(Tokens(), data(), fl.FlowWeightingCallback(per="token"))
