"""The pre-trained values of the trained parameters, kept through a fit and found again by a resumed one.

In: a module as it was built. Out: the values before training, by parameter. Next: `stay_near.py`, `averaging.py`.
`PretrainedCallback` alone checks that a resumed fit has the same values; `distillation.py` and `text_anchor.py` use it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor

from flow_lightning.contract import module_contract
from flow_lightning.distributed import drop_gathered, fill, local
from flow_lightning.run import RunCallback
from flow_lightning.scoring.fingerprint import check_same_model, model_fingerprints


class PretrainedCallback(RunCallback):
    """A callback whose resumed fits must start from the pre-trained weights of the first fit: it keeps their hashes."""

    _fingerprints: dict[str, str] = {}  # by parameter

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._fingerprints = {}

    def check_pretrained(self, found: dict[str, str]) -> None:
        """Note the hashes of the pre-trained weights; a ValueError if a resumed fit has others than the first one."""
        if self.run.resumed:
            check_same_model(self._fingerprints, found)
        self._fingerprints = found

    def state_dict(self) -> dict[str, Any]:
        """Return the hashes of the pre-trained weights."""
        return {"fingerprints": self._fingerprints}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the hashes of a checkpoint."""
        self._fingerprints = state_dict["fingerprints"]


class AnchoredCallback(PretrainedCallback):
    """A callback that knows the pre-trained values of the trained parameters, from `on_train_start` on.

    New parts have none: the module's `head`, its `new_parts` and the head that a LinearProbeCallback finds. The values
    take the memory of one copy of these parameters. A checkpoint does not carry them: for a resumed fit build the
    module from the same weights, as for the first fit.

    Args:
        new_parts: Prefixes of further parameters that are not pre-trained, such as `net.head`.

    Raises:
        ValueError: In the fit, if no pre-trained parameter is trained. In a resumed fit, if the module was built from
            other pre-trained weights.
        RuntimeError: If a fit resumes from a checkpoint that was written without this callback.
    """

    def __init__(self, new_parts: Sequence[str] = ()) -> None:
        self.new_parts = tuple(new_parts)
        self._pretrained: dict[str, Tensor] = {}  # as the module was built, until a fit knows whether it resumes
        self._anchors: dict[Tensor, Tensor] = {}  # by parameter, the part that is on this process

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the pre-trained weights: the checkpoint of a fit that resumes is loaded after this."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._anchors = {}
            self._pretrained = {name: value.detach().cpu().clone() for name, value in pl_module.named_parameters()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix the pre-trained values."""
        drop_gathered(pl_module)
        own: dict[str, Tensor] = dict(pl_module.named_parameters())
        if self.run.resumed:
            self.check_checkpoint(trainer, has_state=bool(self._fingerprints))
            pretrained = {name: value for name, value in self._pretrained.items() if name in self._fingerprints}
        else:
            pretrained = {name: own[name].detach() for name in self._held(trainer, pl_module, own)}
        self.check_pretrained(model_fingerprints(pretrained))
        for name, value in pretrained.items():
            anchor = torch.empty_like(own[name], requires_grad=False)
            fill(anchor, value) if self.run.resumed else anchor.copy_(value)
            self._anchors[own[name]] = local(anchor)
        self._pretrained = {}  # its memory is free again

    def _held(self, trainer: Trainer, module: LightningModule, own: dict[str, Tensor]) -> list[str]:
        """Return the names of the trained parameters that are pre-trained."""
        contract = module_contract(module)
        head = tuple(f"{name}." for name, part in module.named_modules() if part is contract.head)
        new = (*self.new_parts, *contract.new_parts, *head, *self.run.scoring.new_parts)
        unfreezes = any(isinstance(callback, BaseFinetuning) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        names = [name for name, p in own.items() if (unfreezes or p.requires_grad) and not name.startswith(new)]
        if not names:
            raise ValueError(
                f"No trained parameter of {type(module).__name__} is pre-trained, so {type(self).__name__} has "
                "nothing to hold on to. Leave it out; for adapters use weight decay."
            )
        return names

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the memory."""
        super().teardown(trainer, pl_module, stage)
        self._pretrained, self._anchors = {}, {}
