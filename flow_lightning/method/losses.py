"""Model output and targets to one loss per sample, or per token.

In: logits, or hidden states and a head. Out: losses. Next: `flow.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Label of a token that is not supervised, as in torch's cross-entropy and in transformers.
IGNORED = -100


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy of each sample, in float32 whatever precision the logits have.

    Logits are `[B, C]`, targets class indices `[B]`. Losses are in nats, `[B]`, float32 (float64 for float64 logits).
    With smoothing the target's probability is `1 - label_smoothing`, plus the share `label_smoothing / C` that every
    class gets (Szegedy et al., arXiv 1512.00567, section 7).

    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))  # log 4 for an even guess among four
    tensor([1.3863, 1.3863])
    """
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def answer_change(before: Tensor, now: Tensor, temperature: float = 1.0) -> Tensor:
    """Compute KL(before || now) of each sample's answers, `[B]` in nats, from logits `[B, C]` over the temperature.

    The gradient is that of the distillation loss of Li and Hoiem (LwF, arXiv 1606.09282). A class that had probability
    0 before adds nothing. Float32, or float64 for such logits.

    >>> answer_change(torch.zeros(1, 2), torch.tensor([[0.0, 4.0]]), temperature=2.0)
    tensor([0.4338])
    """
    dtype = torch.promote_types(now.dtype, torch.float32)
    log_before, log_now = ((logits.to(dtype) / temperature).log_softmax(1) for logits in (before, now))
    return torch.where(log_before == -torch.inf, 0.0, log_before.exp() * (log_before - log_now)).sum(1)


def feature_change(before: Tensor, now: Tensor) -> Tensor:
    """Compute the squared Euclidean distance of each sample's features, `[B]`, from `[B, ...]`.

    >>> feature_change(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
    tensor([25.])
    """
    return (now.float() - before.float()).square().flatten(1).sum(1)


def early_learning(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Compute the regulariser `log(1 - <p, t>)` of each sample, `[B]`, from predictions p and targets t, `[B, C]`.

    It is the lower, the more a prediction agrees with the running mean of earlier ones (Liu et al., ELR, arXiv
    2007.00151, equation 6). The agreement is bounded by 0.9999, so that it is finite.

    >>> early_learning(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
    tensor([-0.6931])
    """
    return torch.log1p(-(probabilities * targets).sum(1).clamp(max=1 - 1e-4))


def supervised_counts(batch: dict[str, Tensor]) -> Tensor:
    """Count the supervised tokens, `[B]`, of `labels` `[B, T]`. The first token has no prediction, so never counts.

    Samples that `join` put into one row `[1, T]` are told apart by `position_ids`, which start at 0 in each.

    >>> supervised_counts({"labels": torch.tensor([[5, IGNORED, 6, 7]])})
    tensor([2])
    """
    supervised = batch["labels"][:, 1:] != IGNORED
    if "position_ids" not in batch:
        return supervised.sum(dim=1)
    if len(batch["position_ids"]) != 1:
        raise ValueError(
            f"A batch with position_ids is one row of joined samples, but this one has {len(batch['position_ids'])}. "
            "Leave position_ids out of padded batches."
        )
    samples = (batch["position_ids"][0] == 0).cumsum(0) - 1
    counts = samples.new_zeros(int(samples[-1]) + 1)
    return counts.index_add(0, samples[1:], supervised[0].long())


def linear_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk_tokens: int | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Compute the cross-entropy of each token, `[K]` in nats, float32, without the full logits.

    Logits exist for `chunk_tokens` tokens at a time and are computed anew in the backward pass, by torch's
    `linear_cross_entropy` where it gives the same in float32. The gradient of the head is summed over the chunks in
    float32, whatever precision the products have. Liger's kernel is not used: where tokens have different weights its
    gradient of the head was wrong, up to its pull request 1298 of July 2026. There is no second derivative.

    Args:
        hidden: Hidden states, `[K, D]`.
        head_weight: Weight of the output head, `[V, D]`.
        targets: Token ids, `[K]`, integers in `[0, V)`.
        bias: Bias of the output head, `[V]`.
        softcap: Bound of the logits, `softcap * tanh(logits / softcap)`, as Gemma 2 has it.
        scale: Factor of the logits, before the bound.
        chunk_tokens: Tokens whose logits exist at one time; by default those of `tokens_in_memory`.
        z_loss: Adds this times the squared logarithm of the softmax's denominator, which keeps logits from growing
            (Chowdhery et al., PaLM, arXiv 2204.02311, section 5, with 1e-4).

    >>> linear_cross_entropy(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 3]))
    tensor([1.3863, 1.3863])
    """
    chunk_tokens = chunk_tokens or _chunk_of(head_weight)
    if softcap is None and scale == 1.0 and z_loss == 0.0 and _torch_serves(hidden, head_weight):
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=min(chunk_tokens, len(hidden)), chunking_method=None
        )
        return F.linear_cross_entropy(hidden, head_weight, targets, linear_bias=bias, reduction="none", options=options)

    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    settings = (chunk_tokens, dtype, softcap, scale, z_loss)
    losses: Tensor = _ChunkedLosses.apply(hidden, head_weight, bias, targets, settings)
    return losses


class _ChunkedLosses(torch.autograd.Function):
    """Losses of chunks of tokens, whose logits are computed anew in the backward pass.

    Products are in the type that is given. Losses, and the sum of the head's gradient over chunks, are in float32: in
    16 bits each further chunk would round that sum once more.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: Any
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.settings = settings
        size, dtype, softcap, scale, z_loss = settings
        head, losses = _head_in(dtype, weight, bias), []
        with torch.autocast(hidden.device.type, enabled=False):
            for part, ids in zip(hidden.split(size), targets.split(size)):
                logits = _bounded(F.linear(part.to(dtype), *head).float(), softcap, scale)
                own = F.cross_entropy(logits, ids, reduction="none")
                losses.append(own + z_loss * logits.logsumexp(1).square() if z_loss else own)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("The losses of a language model have no second derivative: leave create_graph out.")
        hidden, weight, bias, targets = ctx.saved_tensors
        size, dtype, softcap, scale, z_loss = ctx.settings
        head, of_hidden = _head_in(dtype, weight, bias), []
        of_weight, of_bias = (
            torch.zeros_like(each, dtype=torch.float32) if needed else None
            for each, needed in zip((weight, bias), ctx.needs_input_grad[1:3])
        )
        with torch.autocast(hidden.device.type, enabled=False):
            for part, ids, factors in zip(hidden.to(dtype).split(size), targets.split(size), grad.split(size)):
                logits = _bounded(F.linear(part, *head).float(), softcap, scale)
                of_logits = logits.softmax(1)
                of_logits *= (factors * (1 + 2 * z_loss * logits.logsumexp(1)) if z_loss else factors)[:, None]
                of_logits[torch.arange(len(ids), device=ids.device), ids] -= factors
                if softcap is not None:
                    of_logits *= 1 - (logits / softcap).square()
                of_logits *= scale
                if of_bias is not None:
                    of_bias += of_logits.sum(0)
                of_logits = of_logits.to(dtype)
                if of_weight is not None:
                    of_weight += of_logits.T @ part
                if ctx.needs_input_grad[0]:
                    of_hidden.append(of_logits @ head[0])
        return (
            torch.cat(of_hidden).to(hidden.dtype) if of_hidden else None,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
        )


def _bounded(logits: Tensor, softcap: float | None, scale: float) -> Tensor:
    """Scale logits, and bound them if there is a bound."""
    logits = logits if scale == 1.0 else scale * logits
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _head_in(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a head in the type of its products."""
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def choices(logits: Tensor) -> Tensor:
    """Return the class with the largest logit, `[B]`, of `[B, C]`; -1 where one is NaN: that agrees with nothing.

    >>> choices(torch.tensor([[0.0, 2.0], [torch.nan, 1.0]]))
    tensor([ 1, -1])
    """
    return torch.where(logits.isnan().any(dim=1), -1, logits.argmax(dim=1))


def linear_choices(hidden: Tensor, head_weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the token with the largest logit for each hidden state, `[K]`, without the full logits.

    A softcap, and a scale above 0, do not change which one it is. Arguments are as in `linear_cross_entropy`.

    >>> linear_choices(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 9.0], [1.0, 0.0]]))
    tensor([1])
    """
    parts = hidden.split(_chunk_of(head_weight))
    return torch.cat([choices(F.linear(part, head_weight, bias).float()) for part in parts])


def tokens_in_memory(vocabulary: int, memory: int | None = None) -> int:
    """Return of how many tokens the logits may exist at one time, at least 1.

    Their float32 logits take at most 1/64 of the device's memory, in bytes. The free memory would be another number
    in each run, and losses would differ in their last bits. Where the memory is not given, as on a CPU, they take 64
    MiB, or what 256 tokens take. Smaller chunks are slow there: each makes a gradient of the whole head.

    >>> tokens_in_memory(256_000, 80 * 2**30), tokens_in_memory(256_000, 8 * 2**30), tokens_in_memory(32_000)
    (1310, 131, 524)
    """
    bytes_per_token = 4 * vocabulary
    if memory is None:
        return max(256, 64 * 2**20 // bytes_per_token)
    return max(1, memory // 64 // bytes_per_token)


def _chunk_of(head_weight: Tensor) -> int:
    """Return how many tokens a chunk has by default."""
    return tokens_in_memory(len(head_weight), _memory_of(head_weight.device))


def _memory_of(device: torch.device) -> int | None:
    """Return the memory of a CUDA device in bytes; None for others."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _torch_serves(hidden: Tensor, head_weight: Tensor) -> bool:
    """Tell whether `F.linear_cross_entropy` can be used.

    It exists in recent torch, and returns float32 losses only for float32 inputs.
    """
    plain = hidden.dtype == head_weight.dtype == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
    return plain and len(hidden) > 0 and hasattr(F, "linear_cross_entropy")
