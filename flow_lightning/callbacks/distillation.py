"""A penalty on how far the outputs move from those of the pre-trained model, on the batch's own inputs.

In: a training batch, a frozen copy of the module. Out: a term of the loss. Next: `stay_near.py`, for parameters.
"""

from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from flow_lightning.callbacks.anchored import PretrainedCallback
from flow_lightning.callbacks.around_step import AroundStep
from flow_lightning.contract import module_contract
from flow_lightning.method.losses import answer_change, feature_change
from flow_lightning.scoring.fingerprint import model_fingerprints


class DistillationCallback(AroundStep, PretrainedCallback):
    """Add `strength` times the mean change of each sample's answers, or features, since before training to the loss.

    `answers` is learning without forgetting (Li and Hoiem, LwF, arXiv 1606.09282): KL(before || now) of the answers
    that the pre-trained head gives, which stays as it is here. `features` is the squared distance of what the head sees
    (after Mukhoti et al., LDIFS, arXiv 2308.13320, who take features of several layers). Sample weights do not apply.

    It is for modules that declare `features(batch)` and a `head`, as ImageClassificationModule does, and for `answers`
    a `pretrained_head`. Each step costs a forward pass of the frozen copy more, and its memory. A checkpoint does not
    carry the copy: for a resumed fit build the module from the same weights, as for the first fit.

    Args:
        strength: The factor of the term.
        of: `answers` or `features`.
        temperature: That both answers are divided by before the softmax, above 0.

    Raises:
        ValueError: If an argument is out of range. In a resumed fit, if the module was built from other weights.
        TypeError: In the fit, if the module lacks one of these parts.
        RuntimeError: In the fit, if a step does not run the head on the samples of its batch. Also if a fit resumes
            from a checkpoint that was written without this callback.
    """

    def __init__(
        self, *, strength: float = 1.0, of: Literal["answers", "features"] = "answers", temperature: float = 2.0
    ) -> None:
        for name, value in (("strength", strength), ("temperature", temperature)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; expected a number above 0.")
        if of not in ("answers", "features"):
            raise ValueError(f"of is {of!r}; expected 'answers' or 'features'.")
        self.strength, self.of, self.temperature = strength, of, temperature
        self._frozen: Any = None  # the module before training
        self._head: Any = None  # of the pre-training task
        self._seen: Tensor | None = None  # by the head, in the step that runs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the pre-trained module: the checkpoint of a fit that resumes is loaded after this."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        contract, is_of_answers = module_contract(pl_module), self.of == "answers"
        if contract.features is None or contract.head is None or (is_of_answers and contract.pretrained_head is None):
            raise TypeError(
                f"DistillationCallback(of={self.of!r}) needs features(batch) -> [B, D] and a head"
                f"{' and a pretrained_head' if is_of_answers else ''}, as ImageClassificationModule has. "
                f"{type(pl_module).__name__} lacks one: add it, or use StayNearCallback."
            )
        self._frozen = deepcopy(pl_module).requires_grad_(False).eval()
        self._head = deepcopy(contract.pretrained_head) if is_of_answers else nn.Identity()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the copy where the module is; in a resumed fit check that it is the same one."""
        self.check_checkpoint(trainer, has_state=bool(self._fingerprints))
        head = module_contract(self._frozen).head
        heads = tuple(f"{name}." for name, part in self._frozen.named_modules() if part is head)
        body = {name: value for name, value in self._frozen.state_dict().items() if not name.startswith(heads)}
        self.check_pretrained(model_fingerprints(body))
        for part in (self._frozen, self._head):
            trainer.precision_plugin.convert_module(part).to(pl_module.device)

    def around(self, trainer: Trainer, module: LightningModule, batch: Any) -> AbstractContextManager[Any]:
        """Note what the head sees."""
        self._seen, head = None, module_contract(module).head
        return head.register_forward_pre_hook(self._note)  # type: ignore[union-attr]

    def _note(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen = inputs[0]

    def term(self, trainer: Trainer, module: LightningModule, batch: Any) -> Tensor | None:
        """Compute the change of what the head saw in the step that has just run."""
        now, self._seen = self._seen, None
        with torch.no_grad():
            before = self._frozen.features(batch)
        if now is None or now.shape != before.shape:
            found = "nothing" if now is None else f"shape {list(now.shape)}"
            raise RuntimeError(
                f"In {type(module).__name__}.training_step the head saw {found}, but features(batch) has shape "
                f"{list(before.shape)}. DistillationCallback needs a step that gives the head these features, without "
                "reduction='sampling'."
            )
        if self.of == "features":
            return self.strength * feature_change(before, now).mean()
        return self.strength * answer_change(self._head(before), self._head(now), self.temperature).mean()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the memory."""
        super().teardown(trainer, pl_module, stage)
        self._frozen = self._head = self._seen = None
