"""Stop at the first loss that is NaN or infinite, and say which samples it came from."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from lightning import Trainer
from torch import Tensor

from flow_lightning.distributed import local

_FIX = (
    "Lower the learning rate, clip gradients (--trainer.gradient_clip_val 1.0), or train in 32-true or bf16-mixed, not "
    "16-mixed."
)


class _Pending(NamedTuple):
    step: int
    samples: Tensor
    losses: Tensor
    finite: Tensor
    ready: torch.cuda.Event | None


class FiniteLosses:
    """Check the losses of each step, one step later: by then a GPU has them ready, and nothing waits."""

    def __init__(self) -> None:
        self._pending: _Pending | None = None

    def note(self, step: int, index: Tensor, losses: Tensor) -> None:
        """Check the losses of the step before, and remember these.

        Args:
            step: Number of the batch in training.
            index: Indices of the samples, `[B]`.
            losses: Their losses, `[B]`, or `[K]` of their tokens.

        Raises:
            FloatingPointError: If a loss of the step before is NaN or infinite.
        """
        self.check()
        losses = losses.detach()
        finite = torch.isfinite(losses).all().to("cpu", non_blocking=True)
        ready = torch.cuda.Event() if losses.is_cuda else None
        if ready is not None:
            ready.record()
        self._pending = _Pending(step, index, losses, finite, ready)

    def check(self) -> None:
        """Check what was noted last.

        Raises:
            FloatingPointError: If a loss is NaN or infinite; the message names step and samples.
        """
        if (problem := self._problem()) is not None:
            raise FloatingPointError(problem)

    def check_everywhere(self, trainer: Trainer, parameters: Iterable[Tensor] = ()) -> None:
        """Check what was noted last on any rank, and parameters; to be called on every rank.

        Raises:
            FloatingPointError: On every rank, if a loss or a parameter is NaN or infinite on one of them.
        """
        problem = self._problem()
        if problem is None and not all(bool(torch.isfinite(local(value)).all()) for value in parameters):
            problem = (
                f"Parameters of the model are NaN or infinite after batch {trainer.fit_loop.total_batch_idx}: it has "
                f"diverged. {_FIX}"
            )
        if not trainer.strategy.reduce_boolean_decision(problem is None, all=True):
            raise FloatingPointError(problem or "Training has diverged in another process; see its message.")

    def _problem(self) -> str | None:
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        if pending.ready is not None:
            pending.ready.synchronize()
        return None if pending.finite else _message(pending)


def _message(pending: _Pending) -> str:
    broken = ~torch.isfinite(pending.losses)
    own = broken.shape == pending.samples.shape
    samples = (pending.samples[broken] if own else pending.samples).tolist()
    shown = ", ".join(map(str, samples[:20])) + (", ..." if len(samples) > 20 else "")
    return (
        f"The training loss is NaN or infinite at batch {pending.step}, {'for' if own else 'in a batch of'} the "
        f"samples {shown} of the training set. If these samples are sound, the model has diverged. {_FIX}"
    )
