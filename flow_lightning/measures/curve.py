"""What a curve measures at each point of a path, beside what is kept: the test set, of text the validation set, too.

In: Trainer and module, at a point. Out: `test_top1` and `test_hard_top1`, or `test_loss` and `validation_loss`.
Next: `callbacks/retention_budget.py`.
"""

from lightning import LightningModule, Trainer
from torch import Tensor

from flow_lightning.measures.base import When
from flow_lightning.measures.images import TargetAccuracy, hardest, mean
from flow_lightning.measures.target import validation_dataloader
from flow_lightning.measures.text import TargetLoss, mean_token_loss
from flow_lightning.scoring.samples import read_once


class Curve:
    """The test set at the points of a path, whose samples are read once for all of them.

    Hard are the tenth of the test images with the highest losses before training. A board compares methods on these,
    so they must be the same for all: they are those of the head that training begins with.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, *, is_text: bool) -> None:
        self.trainer, self.module = trainer, module
        self.test = TargetLoss() if is_text else TargetAccuracy()
        self.test.prepare(trainer, module)
        if self.test.loader is not None:
            self.test.loader = read_once(self.test.loader)
        validation = validation_dataloader(trainer) if is_text else None
        self.validation = None if validation is None else read_once(validation)
        self.hard: Tensor | None = None

    def find_hard(self) -> None:
        """Note which test images are hard for the module as it is now; without this alpha 0 tells."""
        if isinstance(self.test, TargetAccuracy):
            losses, *_ = self.test.outcomes(self.trainer, self.module, "before")
            self.hard = hardest(losses)

    def measure(self, alpha: float) -> dict[str, float]:
        """Measure the module, which is at the point `alpha`: 0 is the frozen body, whose features are known."""
        when: When = "after" if alpha else "before"
        if isinstance(self.test, TargetAccuracy):
            losses, correct, *_ = self.test.outcomes(self.trainer, self.module, when)
            if self.hard is None:
                self.hard = hardest(losses)
            return {"test_top1": mean(correct), "test_hard_top1": mean(correct[self.hard])}
        found = {"test_loss": self.test.measure(self.trainer, self.module, when)["loss"]}
        if self.validation is not None:
            loss = mean_token_loss(self.trainer, self.module, self.validation, f"Path {alpha:g}: validation")
            found["validation_loss"] = float(loss)
        return found
