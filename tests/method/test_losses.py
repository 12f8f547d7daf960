import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flow_lightning.method.losses as losses_module
from flow_lightning.method.losses import (
    answer_change,
    cross_entropy,
    feature_change,
    linear_cross_entropy,
    supervised_counts,
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_minus_the_log_probability_in_at_least_float32(dtype):
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(9) % 5
    losses = cross_entropy(logits, targets)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = -log_softmax(logits.double().numpy(), axis=1)[np.arange(9), targets.numpy()]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


def test_smoothed_labels_are_mixed_with_an_even_guess():
    logits, targets = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), np.arange(9) % 5
    soft = 0.7 * np.eye(5)[targets] + 0.3 / 5
    losses = cross_entropy(logits, torch.from_numpy(targets), label_smoothing=0.3)
    expected = -(soft * log_softmax(logits.double().numpy(), axis=1)).sum(1)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_change_of_answers_is_the_divergence_of_scipy(dtype):
    before, now = 5 * torch.randn(2, 40, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    before[0, 0] = -torch.inf  # an impossible class
    p, q = (softmax(logits.double().numpy() / 1.7, axis=1) for logits in (before, now))
    found, expected = answer_change(before, now, 1.7), rel_entr(p, q).sum(1)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    of_probabilities = answer_change((before / 1.7).log_softmax(1), now / 1.7)
    assert float(of_probabilities.mean()) == pytest.approx(expected.mean(), rel=1e-5 if dtype.itemsize > 2 else 1e-2)


def test_the_change_of_features_is_the_squared_norm_of_numpy():
    before, now = torch.randn(2, 9, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = np.linalg.norm((now - before).numpy().reshape(9, -1), axis=1) ** 2
    np.testing.assert_allclose(feature_change(before, now).numpy(), expected, rtol=1e-5)


TOKENS, WIDTH, VOCABULARY, CHUNK = 37, 6, 50, 8
#: Softcap, scale, whether there is a bias, and the z-loss: torch's own function serves where only a bias is.
HEADS = [(None, 1.0, False, 0.0), (None, 1.0, True, 0.0), (2.0, 1.0, False, 0.0), (None, 0.3, True, 0.0)]
HEADS += [(2.0, 3.0, True, 0.0), (None, 1.0, False, 0.1), (None, 1.0, True, 0.1), (2.0, 3.0, True, 0.1)]


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def logits_losses(hidden, head, targets, bias, softcap, scale, chunk_tokens=None, z_loss=0.0):
    """The losses from whole logits, by the formula."""
    logits = hidden @ head.T
    logits = scale * (logits if bias is None else logits + bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    normaliser = logits.exp().sum(1).log()
    return normaliser - logits[torch.arange(len(targets)), targets] + z_loss * normaliser**2


def assert_close(found, expected):
    """Compare by norms, so that no number near zero counts for more than the others."""
    assert found.dtype == torch.float32
    assert (found.double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("chunk_tokens", [CHUNK, None])
@pytest.mark.parametrize(("softcap", "scale", "has_bias", "z_loss"), HEADS)
def test_weighted_losses_and_gradients_are_those_of_float64_logits(softcap, scale, has_bias, z_loss, chunk_tokens):
    """The head is also the embedding, so that its gradient comes by both ways; each token has a weight, some none."""
    tied, bias, ids = drawn(VOCABULARY, WIDTH), drawn(VOCABULARY), torch.arange(TOKENS) * 7 % VOCABULARY
    targets, weights = torch.arange(TOKENS) * 11 % VOCABULARY, torch.linspace(0, 2, TOKENS)
    found, expected, more = [], [], (softcap, scale, chunk_tokens, z_loss)
    for function, dtype, rows in (
        (linear_cross_entropy, torch.float32, found),
        (logits_losses, torch.float64, expected),
    ):
        head, offset = tied.to(dtype, copy=True).requires_grad_(), bias.to(dtype, copy=True).requires_grad_()
        losses = function(head[ids].sin(), head, targets, offset if has_bias else None, *more)
        (weights.to(dtype) * losses).sum().backward()
        with torch.no_grad():  # as in scoring
            scored = function(head[ids].sin(), head, targets, offset if has_bias else None, *more)
        rows.extend([losses.detach(), scored, head.grad] + [offset.grad] * has_bias)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("frozen", ["hidden", "head"])
def test_what_is_frozen_has_no_gradient_and_a_second_derivative_is_refused(frozen):
    hidden, head = (
        drawn(9, WIDTH).requires_grad_(frozen != "hidden"),
        drawn(20, WIDTH).requires_grad_(frozen != "head"),
    )
    losses = linear_cross_entropy(hidden, head, torch.arange(9), None, 2.0)
    (found,) = torch.autograd.grad(losses.sum(), [head if frozen == "hidden" else hidden], retain_graph=True)
    assert found.any()
    losses.sum().backward(retain_graph=True)
    assert (hidden.grad is None) == (frozen == "hidden") and (head.grad is None) == (frozen == "head")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(losses.sum(), [head if frozen == "hidden" else hidden], create_graph=True)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_the_heads_gradient_is_as_exact_from_many_chunks_as_from_one(autocast):
    """Its sum over the chunks is in float32: in bfloat16 256 chunks had seven times the error of one."""
    hidden, head, targets = drawn(256, WIDTH).bfloat16(), drawn(500, WIDTH).bfloat16(), torch.arange(256) * 11 % 500
    exact = head.double().requires_grad_()
    torch.nn.functional.cross_entropy(hidden.double() @ exact.T, targets, reduction="sum").backward()
    errors = []
    for chunk_tokens in (256, 1):
        found = (head.float() if autocast else head.clone()).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            linear_cross_entropy(hidden, found, targets, chunk_tokens=chunk_tokens).sum().backward()
        errors.append(float((found.grad.double() - exact.grad).norm() / exact.grad.norm()))
    assert errors[1] <= 1.1 * errors[0] < 0.02


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 0.5)])
def test_no_tokens_have_no_losses(softcap, scale):
    targets = torch.zeros(0, dtype=torch.long)
    assert linear_cross_entropy(drawn(0, WIDTH), drawn(VOCABULARY, WIDTH), targets, None, softcap, scale).shape == (0,)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, in elements."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return made


def largest_of(function, *arguments):
    hidden, head = drawn(TOKENS, WIDTH).requires_grad_(), drawn(VOCABULARY, WIDTH).requires_grad_()
    with Largest() as largest:
        function(hidden, head, torch.arange(TOKENS), None, *arguments).sum().backward()
    assert hidden.grad is not None and head.grad is not None
    return largest.elements


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 0.5)])
def test_no_tensor_of_tokens_times_vocabulary_is_made(softcap, scale):
    """Neither forward nor backward: what is largest is one chunk of logits, or the gradient of the head."""
    assert largest_of(logits_losses, softcap, scale) == TOKENS * VOCABULARY  # so that a whole one would be seen
    found = largest_of(linear_cross_entropy, softcap, scale, CHUNK)
    assert found <= VOCABULARY * max(CHUNK, WIDTH)


@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (None, 0.1), (2.0, 0.1)])
def test_the_logits_of_a_chunk_keep_below_their_share_of_the_devices_memory(monkeypatch, softcap, z_loss):
    """A device with room for the float32 logits of eight tokens in 1/64 of its memory, and half of a ninth."""
    memory = int(64 * 4 * VOCABULARY * (CHUNK + 0.5))
    monkeypatch.setattr(losses_module, "_memory_of", lambda device: memory)
    found = largest_of(linear_cross_entropy, softcap, 1.0, None, z_loss)
    assert found == VOCABULARY * CHUNK <= memory / 64 / 4


def test_padded_rows_with_positions_are_no_joined_samples():
    rows = torch.arange(8).view(2, 4)
    with pytest.raises(ValueError, match="Leave position_ids out"):
        supervised_counts({"labels": rows, "position_ids": rows})
