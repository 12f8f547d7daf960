"""A pull of the trained parameters back to their pre-trained values, as companion or rival of the weights.

In: the pre-trained parameters, the gradients of each optimizer step. Out: gradients with the pull in them.
Next: `distillation.py`, which holds on to outputs in place of parameters.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from flow_lightning.callbacks.retention import other_callbacks
from flow_lightning.contract import module_contract
from flow_lightning.distributed import drop_gathered, fill, local
from flow_lightning.run import RunCallback
from flow_lightning.scoring.fingerprint import check_same_model, model_fingerprints


class StayNearCallback(RunCallback):
    """Add the penalty `strength / 2 * sum((p - p0) ** 2)`, or `strength * sum(|p - p0|)`, to the objective.

    p are the trained parameters that are pre-trained, p0 their values before training: L2-SP and L1-SP (Li et al.,
    arXiv 1802.01483). The gradient of the penalty is added to that of the loss once an optimizer step, before
    clipping. No weights apply to it. New parts are free: the module's `head`, its `new_parts` and the head that a
    LinearProbeCallback finds. So is a parameter that has no gradient in a step.

    It takes memory for one copy of these parameters. A checkpoint does not carry them: for a resumed fit build the
    module from the same weights, as for the first fit.

    Args:
        strength: The factor of the penalty, in the unit of the loss per squared (`l1`: absolute) change.
        norm: `l2` or `l1`.
        new_parts: Prefixes of further parameters that are not pre-trained, such as `net.head`.

    Raises:
        ValueError: If an argument is out of range. In the fit, if no pre-trained parameter is trained. In a resumed
            fit, if the module was built from other pre-trained weights.
        RuntimeError: If a fit resumes from a checkpoint that was written without this callback.
    """

    def __init__(
        self, *, strength: float = 0.01, norm: Literal["l2", "l1"] = "l2", new_parts: Sequence[str] = ()
    ) -> None:
        if not 0 <= strength < float("inf"):
            raise ValueError(f"strength is {strength}; expected a number from 0, such as 0.01.")
        if norm not in ("l2", "l1"):
            raise ValueError(f"norm is {norm!r}; expected 'l2' or 'l1'.")
        self.strength, self.norm, self.new_parts = strength, norm, tuple(new_parts)
        self._pretrained: dict[str, Tensor] = {}  # as the module was built, until a fit knows whether it resumes
        self._anchors: dict[Tensor, Tensor] = {}  # by parameter, the part that is on this process
        self._fingerprints: dict[str, str] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the pre-trained weights: the checkpoint of a fit that resumes is loaded after this."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._anchors, self._fingerprints = {}, {}
            self._pretrained = {name: value.detach().cpu().clone() for name, value in pl_module.named_parameters()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix what the parameters are held to, and be the last to change gradients."""
        drop_gathered(pl_module)
        own: dict[str, Tensor] = dict(pl_module.named_parameters())
        if self.run.resumed:
            pretrained = self._resumed(trainer)
        else:
            pretrained = {name: own[name].detach() for name in self._held(trainer, pl_module, own)}
            self._fingerprints = model_fingerprints(pretrained)
        for name, value in pretrained.items():
            anchor = torch.empty_like(own[name], requires_grad=False)
            fill(anchor, value) if self.run.resumed else anchor.copy_(value)
            self._anchors[own[name]] = local(anchor)
        self._pretrained = {}  # its memory is free again
        # StepDenominator divides the gradients of the losses; the penalty has no denominator.
        trainer.callbacks = [*other_callbacks(trainer, self), self]  # type: ignore[attr-defined]

    def _held(self, trainer: Trainer, module: LightningModule, own: dict[str, Tensor]) -> list[str]:
        """Return the names of the trained parameters that are pre-trained."""
        contract = module_contract(module)
        head = tuple(f"{name}." for name, part in module.named_modules() if part is contract.head)
        new = (*self.new_parts, *contract.new_parts, *head, *self.run.scoring.new_parts)
        unfreezes = any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        names = [name for name, p in own.items() if (unfreezes or p.requires_grad) and not name.startswith(new)]
        if not names:
            raise ValueError(
                f"No trained parameter of {type(module).__name__} is pre-trained, so StayNearCallback has nothing to "
                "hold. Leave it out; for adapters use weight decay."
            )
        return names

    def _resumed(self, trainer: Trainer) -> dict[str, Tensor]:
        """Return the pre-trained values, after a check that they are those of the first fit."""
        if not self._fingerprints:
            raise RuntimeError(
                f"The checkpoint {trainer.ckpt_path} was written without StayNearCallback, so what to stay near is "
                "not known. Start the fit from the pre-trained model with it."
            )
        held = {name: value for name, value in self._pretrained.items() if name in self._fingerprints}
        check_same_model(self._fingerprints, model_fingerprints(held))
        return held

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the gradient of the penalty."""
        strength = self.strength * _gradient_scale(trainer, optimizer)
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            anchor = self._anchors.get(parameter)
            if anchor is None or parameter.grad is None:
                continue
            change = local(parameter) - anchor
            local(parameter.grad).add_(change if self.norm == "l2" else change.sign(), alpha=strength)

    def state_dict(self) -> dict[str, Any]:
        """Return the fingerprints of the pre-trained parameters."""
        return {"fingerprints": self._fingerprints}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the fingerprints of a checkpoint."""
        self._fingerprints = state_dict["fingerprints"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the memory."""
        super().teardown(trainer, pl_module, stage)
        self._pretrained, self._anchors = {}, {}


def _gradient_scale(trainer: Trainer, optimizer: Any) -> float:
    """Return by what the gradients are multiplied here: fused optimizers undo the scale of 16-mixed themselves."""
    precision = trainer.precision_plugin
    unscales = getattr(optimizer, "_step_supports_amp_scaling", False)  # as torch's GradScaler asks
    scaler = precision.scaler if isinstance(precision, MixedPrecision) and unscales else None
    return 1.0 if scaler is None else scaler.get_scale()
