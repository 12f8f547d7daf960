"""A budget on forgetting: the fit ends on the furthest point of its path that surely keeps enough.

In: the pre-trained model, the fine-tuned one, samples to watch. Out: the chosen model, `path.png`, numbers for
`metrics.json`. Next: `method/path.py` and `method/budget.py`, which compute both.
"""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from flow_lightning.callbacks.anchored import PretrainedCallback
from flow_lightning.callbacks.linear_probe import probes_of
from flow_lightning.callbacks.retention import other_callbacks
from flow_lightning.contract import module_contract
from flow_lightning.distributed import on_rank_zero, put, trained_tensors
from flow_lightning.measures.curve import Curve
from flow_lightning.measures.outcomes import Outcomes, TargetOutcomes, TextOutcomes, halves, watched
from flow_lightning.measures.target import check_curve
from flow_lightning.method.budget import COMPARISONS, Kept, check_size, last_kept
from flow_lightning.method.path import Shape, check_path, check_shape, point
from flow_lightning.method.probe import Probe
from flow_lightning.report.metrics import path_table, print_table
from flow_lightning.scoring.fingerprint import model_fingerprints
from flow_lightning.scoring.samples import read_once


class RetentionBudgetCallback(PretrainedCallback):
    """Choose the furthest point from pre-trained to fine-tuned weights that keeps a budget on forgetting.

    At `on_train_end` it walks the path `pretrained + alpha * (finetuned - pretrained)` (see `method/path.py`). In the
    order of alpha it tests whether a point keeps at least `keep` of what the pre-trained model did, with `confidence`.
    The last point before the first that does not surely keep it becomes the model. If only alpha 0 does, the body is
    the pre-trained one again. A LinearProbeCallback in the fit then solves the head anew, with the sample weights;
    without one, the head is on the path, too.

    Half of the retention set chooses; what is kept on the other half is reported. Numbers are in `metrics.json`
    (`budget/...`, and `path/points` for all points), the picture is `path.png`. A fit that writes checkpoints writes a
    chosen model other than the fine-tuned one to `checkpoints/budget.ckpt`; a probe that refits writes its own file.
    RetentionCallback then measures the chosen model. Points beyond the first that is not kept are left out, but for the
    last. Each costs a forward pass of half the retention set, at most `samples`, and of at most 250 samples of the
    target. The pre-trained model does both halves before training.

    A checkpoint carries what a resumed fit needs, but for the pre-trained weights: build the module from them again, as
    for the first fit.

    Args:
        keep: The share to keep, in (0, 1).
        confidence: Probability that the promise holds, in (0, 1), if retention samples are independent draws.
        of: What is kept. `accuracy` on labelled images, with the pre-trained head, gains counted. `agreement` of the
            answers with those of the pre-trained model: stricter, but without labels. Of a language model these are its
            most likely next tokens. `perplexity` of text: that of the pre-trained model, divided by that of the point.
        data: Images, as for `PretrainedImages`; for language models text files, as for `GeneralText`; or such a measure
            itself, with its settings. None, for `agreement` of images: the inputs of the training; the promise is about
            these then. Answers are those of the pre-trained head, if the module has one, else the logits in its
            `training_step`, with the head from before training if a probe was fitted.
        alphas: The points, in ascending order, from 0 (pre-trained) to 1 (fine-tuned). 0 is always one of them. A tight
            budget needs small steps near 0.
        shape: `even`, or `depth`: early layers move less, see `flow_lightning.method.path.depth_factors`.
        samples: Most samples of each half.
        curve: Whether to measure all points, for a board (see `compare`): on the other half and on the test set, too.
            Of text that is the loss, and the validation set's. A LinearProbeCallback solves its head anew for that, in
            a pass over the training set for each but alpha 0, of which it keeps the features. Without loader processes,
            samples are read once for all points, up to 1 GiB.
        guard: Whether to stop a training that is beyond recovery. At the end of an epoch, the first point after alpha 0
            then keeps less than `keep`, by more than the bound's distance. It costs a forward pass of half the
            retention set, at most `samples`, per epoch. It only ends the training, so the promise is not weakened.

    Raises:
        ValueError: If an argument is out of range. In the fit, if the retention set is too small or has no labels. In
            a resumed fit, if the module was built from other pre-trained weights.
        TypeError: In the fit, if data or module do not go with `of`.
        RuntimeError: If a fit resumes from a checkpoint that was written without this callback.
    """

    def __init__(
        self,
        *,
        keep: float = 0.98,
        confidence: float = 0.95,
        of: Literal["accuracy", "agreement", "perplexity"] = "accuracy",
        data: Any = None,  # of other types the command line would read the file of that name
        alphas: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
        shape: Shape = "even",
        samples: int = 1000,
        curve: bool = False,
        guard: bool = False,
    ) -> None:
        for name, value in (("keep", keep), ("confidence", confidence)):
            if not 0 < value < 1:
                raise ValueError(f"{name} is {value}; expected a number between 0 and 1, such as 0.98.")
        if of not in COMPARISONS:
            raise ValueError(f"of is {of!r}; expected one of {', '.join(COMPARISONS)}.")
        if data is None and of != "agreement":
            raise ValueError(f"of={of!r} needs data: {'text files' if of == 'perplexity' else 'labelled images'}.")
        if not alphas or list(alphas) != sorted(set(alphas)) or alphas[0] < 0 or alphas[-1] > 1:
            raise ValueError(f"alphas are {list(alphas)}; expected different numbers from 0 to 1 in ascending order.")
        check_shape(shape)
        self.keep, self.confidence, self.of, self.data, self.shape = keep, confidence, of, data, shape
        self.alphas, self.samples, self.curve = [0.0, *(alpha for alpha in alphas if alpha > 0)], samples, curve
        self.guard = guard
        self._reset()

    def _reset(self) -> None:
        self.points: list[dict[str, float]] = []  #: of the path: alpha, kept, bound, target_loss, ...
        self.alpha: float | None = None  #: of the chosen point
        self._pretrained: dict[str, Tensor] = {}
        self._head: dict[str, Tensor] = {}  # before training, if a probe is fitted
        self._before: list[Tensor] = []  # outcomes of the pre-trained model on both halves
        self._heads: dict[float, Probe] = {}  # solved at the points of a curve, by alpha
        self._forwards = 0
        self._training: Any = None  # samples of the training and the test, for a curve
        self._on_curve: Curve | None = None

    # -- before training -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the pre-trained weights: the checkpoint of a fit that resumes is loaded after this."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._reset()
        self._pretrained = trained_tensors(trainer, pl_module)
        # First, so that missing data are found before hours of scoring.
        trainer.callbacks = [self, *other_callbacks(trainer, self)]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the data, and refuse what is too small or does not go with the module."""
        for probe in probes_of(trainer):
            probe.keeps_features = self.curve
        self.run.scoring.frozen.keeps_features = self.curve
        self._watched: Outcomes = watched(self.of, self.data, pl_module)
        self._watched.prepare(trainer, pl_module, self.run.scoring.samples)
        groups, is_text = self._watched.groups, isinstance(self._watched, TextOutcomes)
        self._halves = halves(groups, self.samples)
        check_size(len(self._halves[0]), self.keep, self.confidence, self.of, is_text)
        if (photographs := len(set(groups))) < len(groups):
            rank_zero_warn(
                f"The budget's {len(groups)} images are parts of {photographs} photographs, so they are not "
                "independent: the promise is about pictures like these. Use more photographs for a stronger one."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the pre-trained model and what it does on both halves; a resumed fit has that from its checkpoint."""
        self._started = time.perf_counter()
        if self.curve:
            check_curve(trainer)
        self.check_checkpoint(trainer, has_state=bool(self._before))
        if self.run.resumed:
            self._pretrained |= self._head
        else:
            self._pretrained, heads = trained_tensors(trainer, pl_module), self.run.scoring.kind.new_parts
            self._head = {name: value for name, value in self._pretrained.items() if name.startswith(heads)}
        body = {name: value for name, value in self._pretrained.items() if name not in self._head}
        self.check_pretrained(model_fingerprints(body))
        if self.run.resumed:
            check_path(self._pretrained, trained_tensors(trainer, pl_module))
        else:
            with module_contract(pl_module).frozen_reference():
                known = self._watched.before(trainer, pl_module, self._halves)
                self._before = known or [self._outcomes(trainer, pl_module, half, "before") for half in (0, 1)]
        if self.of == "accuracy":
            what = "images that the pre-trained model has right"
            check_size(int(self._before[0].sum()), self.keep, self.confidence, self.of, what=what)
        # After what averages weights, and before everything that takes the model as it is in the end.
        others = other_callbacks(trainer, self)
        averaging = [other for other in others if isinstance(other, WeightAveraging | StochasticWeightAveraging)]
        trainer.callbacks = [*averaging, self, *(other for other in others if other not in averaging)]  # type: ignore[attr-defined]
        self._seconds = time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed fit needs: tensors and primitives."""
        return {**super().state_dict(), "before": self._before, "head": self._head}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an earlier fit found."""
        super().load_state_dict(state_dict)
        self._before, self._head = state_dict["before"], state_dict["head"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With `guard`, stop a training of which only the pre-trained model would be left."""
        if not self.guard or len(self.alphas) == 1:
            return
        first = self.alphas[1]  # after 0
        trained = trained_tensors(trainer, pl_module)
        put(pl_module, point(self._pretrained, trained, first, self.shape) | self._head)
        kept = self._kept(trainer, pl_module, first, 0)
        put(pl_module, trained)
        if kept.share + (kept.share - kept.bound) < self.keep:
            trainer.should_stop = True
            rank_zero_warn(
                f"Training stops after epoch {trainer.current_epoch}: even at alpha {first:g} the model keeps only "
                f"{kept.share:.1%} of the {self.of}, and {self.keep:.1%} are asked for. Lower the learning rate."
            )

    # -- after training ------------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Walk the path, choose, and put the chosen point into the module."""
        started = time.perf_counter()
        finetuned = trained_tensors(trainer, pl_module)
        target = TargetOutcomes()
        target.prepare(trainer, pl_module, self.run.scoring.samples)
        at = partial(point, self._pretrained, finetuned, shape=self.shape)
        if self.curve:
            self._training = read_once(self.run.scoring.samples.loader)
            self._on_curve = Curve(trainer, pl_module, is_text=isinstance(self._watched, TextOutcomes))
        for alpha in self.alphas:
            # Beyond the first that is not kept there is nothing to choose; the last one tells the budget's price.
            if self.curve or alpha == self.alphas[-1] or all(each["bound"] >= self.keep for each in self.points):
                self.points.append(self._measured(trainer, pl_module, target, alpha, at(alpha)))
        chosen = max(0, last_kept([each["bound"] for each in self.points], self.keep))
        self.alpha = self.points[chosen]["alpha"]
        other = self.points[chosen].get("kept_other_half")  # a curve has it
        if other is None:
            put(pl_module, at(self.alpha) | self._head)
            other = self._kept(trainer, pl_module, self.alpha, 1).share
        put(pl_module, at(self.alpha))
        for probe in probes_of(trainer):
            probe.solved = self._heads.get(self.alpha)
        self._save(trainer)
        metrics = self._metrics(self.points[chosen], other)
        metrics["time/budget_s"] = self._seconds + time.perf_counter() - started
        self.run.record(trainer, {"path/points": self.points} | metrics)
        self._say(metrics, target)
        on_rank_zero(trainer, lambda: self._report(trainer.loggers))
        self._pretrained = {}  # its memory is free again
        self._training = self._on_curve = None

    def _measured(
        self, trainer: Trainer, module: LightningModule, target: TargetOutcomes, alpha: float, at: dict[str, Tensor]
    ) -> dict[str, float]:
        """Measure what a point keeps on the half that chooses, and the target."""
        put(module, at | self._head)
        kept = self._kept(trainer, module, alpha, 0)
        others, probes, curve = {}, probes_of(trainer), self._on_curve
        if curve is not None:
            others = {"kept_other_half": self._kept(trainer, module, alpha, 1).share}
            if alpha == 0 and probes:
                curve.find_hard()
        put(module, {name: at[name] for name in self._head})
        if curve is not None:
            for probe in probes:
                self._heads[alpha] = probe.solve(module, self._training, alpha == 0)
            others |= curve.measure(alpha)
        self._forwards += len(target.positions)
        on_target = target.measure(trainer, module, f"Path {alpha:g}: target")
        return {"alpha": alpha, "kept": kept.share, "bound": kept.bound} | on_target | others

    def _kept(self, trainer: Trainer, module: LightningModule, alpha: float, half: int) -> Kept:
        if alpha == 0:  # the pre-trained model itself
            return Kept(1.0, 1.0)
        after = self._outcomes(trainer, module, half, f"{alpha:g}")
        return COMPARISONS[self.of](self._before[half], after, self.confidence)

    def _outcomes(self, trainer: Trainer, module: LightningModule, half: int, when: str) -> Tensor:
        positions = self._halves[half]
        self._forwards += len(positions)
        values = self._watched(trainer, module, positions, f"Path {when}: {self.of}")
        return values[0] if len(values) == 1 else torch.stack([value.double() for value in values], dim=1)

    def _metrics(self, chosen: Mapping[str, float], other: float) -> dict[str, float]:
        free = {f"{name}_free": value for name, value in self.points[-1].items() if name.startswith("target_")}
        values = {"keep": self.keep, "kept_other_half": other, "forwards": self._forwards, **chosen, **free}
        return {f"budget/{name}": value for name, value in values.items()}

    def _save(self, trainer: Trainer) -> None:
        """Write the chosen model, unless a probe will do so with its new head."""
        moved = (self.alpha, self.shape) != (1, "even")
        self.run.is_body_moved |= moved
        refits = any(probe.refit is not False for probe in probes_of(trainer))
        if moved and not refits and trainer.checkpoint_callback is not None and self.run.directory is not None:
            trainer.save_checkpoint(self.run.directory / "checkpoints" / "budget.ckpt")

    def _say(self, metrics: Mapping[str, float], target: TargetOutcomes) -> None:
        name = "target_top1" if "budget/target_top1" in metrics else "target_loss"
        where = f"On {len(target.positions)} {'validation' if target.is_held_out else 'training'} samples {name} is"
        at, end = metrics[f"budget/{name}"], metrics[f"budget/{name}_free"]
        cost = f"{where} {at:.3f}; at alpha {self.alphas[-1]:g}, {end:.3f}."
        if self.alpha == 0:
            rank_zero_warn(
                f"No point of the path surely keeps {self.keep:.1%} of the {self.of} (confidence "
                f"{self.confidence:.0%}): the body is the pre-trained one again. More retention samples may show that "
                f"a point does. {cost}"
            )
            return
        rank_zero_info(
            f"Budget: at alpha {self.alpha:g} the model keeps {metrics['budget/kept']:.1%} of the {self.of}, with "
            f"confidence {self.confidence:.0%} at least {metrics['budget/bound']:.1%}; on the other half "
            f"{metrics['budget/kept_other_half']:.1%}. {cost}"
        )

    def _report(self, loggers: Sequence[Any]) -> None:
        file: Any = "No files are written."
        if self.run.directory is not None:
            from flow_lightning.report.loggers import log_picture  # matplotlib is slow to import
            from flow_lightning.report.pictures import plot_path

            file = self.run.directory / "path.png"
            plot_path(self.points, self.alpha or 0.0, self.keep, self.of, file)
            log_picture(loggers, "path", file)
        print_table(path_table(self.points, self.alpha or 0.0, self.of), str(file))
