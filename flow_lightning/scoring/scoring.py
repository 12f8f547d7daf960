"""The frozen model over the training set, once per fit, however many callbacks ask.

In: Trainer and module of a fit. Out: losses by sample, and the probe behind them. Next: `callbacks/flow_weighting.py`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from flow_lightning.contract import module_contract
from flow_lightning.distributed import from_rank_zero, on_rank_zero
from flow_lightning.scoring.fingerprint import join_fingerprints, model_fingerprints
from flow_lightning.scoring.frozen import Frozen
from flow_lightning.scoring.kinds import Kind, ProbeFeatures, SampleLosses
from flow_lightning.scoring.samples import Samples, find_samples
from flow_lightning.scoring.score import Block, score_blocks
from flow_lightning.scoring.store import BlockStore, Rows, batches_to_check, first_difference, read_file, rows_of


@dataclass
class Scoring:
    """What is scored in a fit, and what came of it. Callbacks say so in their `setup`.

    Attributes:
        trainer: Runs the fit.
        module: The model.
        kind: What is computed.
        file: Where the result is kept for later fits, and blocks while scoring; None to keep nothing.
        given: Data set or DataLoader to score, if not the fit's own.
        key: Which of several training loaders.
        new_parts: Prefixes of parameters that are not pre-trained.
        is_from_file: Whether the result was read, not computed.
    """

    trainer: Trainer
    module: LightningModule
    kind: Kind = field(default_factory=SampleLosses)
    file: Path | None = None
    given: Any = None
    key: str | int | None = None
    new_parts: tuple[str, ...] = ()
    is_from_file: bool = False
    _is_inspected: bool = False
    _reference: dict[str, str] = field(default_factory=dict)
    _result: dict[str, Tensor] | None = None
    _checked: Rows | None = None

    def choose(self, kind: Kind) -> None:
        """Set what is computed. A probe's losses take the place of the module's own.

        Raises:
            ValueError: If another callback has chosen something else.
        """
        if isinstance(kind, SampleLosses) and isinstance(self.kind, ProbeFeatures):
            return
        if not isinstance(self.kind, SampleLosses | type(kind)):
            raise ValueError(f"This fit is to score {self.kind.name} and {kind.name}: use one of the two callbacks.")
        self.kind = kind

    @cached_property
    def frozen(self) -> Frozen:
        """What the pre-trained model makes of samples, of these and others."""
        return Frozen(self.trainer, self.module)

    @cached_property
    def samples(self) -> Samples:
        """The samples to score."""
        return find_samples(self.trainer, self.module, self.given, self.key)

    def look_at_model(self) -> None:
        """Take the fingerprint of the pre-trained model, once: in `setup`, before any checkpoint is restored.

        Nothing can be taken while the model's parts are still to be made, in `configure_model`.
        """
        self._reference = self._reference or model_fingerprints(self.module.state_dict())

    @property
    def reference(self) -> str:
        """The fingerprint of the pre-trained model, without its new parts; nothing if it is not known."""
        return join_fingerprints(self._reference, self.new_parts)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the result belongs to: hashes of the data set and of the pre-trained model."""
        self._inspect()
        return {"dataset": self.samples.fingerprint, "reference": self.reference}

    def _inspect(self) -> None:
        """Let the kind see a few samples, once."""
        if not self._is_inspected:
            self._is_inspected = True
            self.kind.inspect(self.trainer, self.module, self.samples)
            self.new_parts += self.kind.new_parts

    def scored(self) -> dict[str, Tensor]:
        """Return the losses and what belongs to them, see `Kind.collect`: scored once, the same on every rank."""
        if self._result is None:
            self.look_at_model()
            self._inspect()
            with module_contract(self.module).frozen_reference():
                self._result = self._from_file() or self._score(self._of_frozen() or self._blocks())
        return self._result

    def scored_now(
        self, kind: ProbeFeatures, loader: DataLoader[Any] | None = None, found: tuple[Tensor, ...] | None = None
    ) -> dict[str, Tensor]:
        """Score the same samples by the model as it is now: not frozen, not kept.

        Another loader may read them. No sample is read if features and targets are found already.
        """
        now = replace(self, kind=kind, file=None)
        samples = self.samples
        now.samples = samples if loader is None else Samples(loader, samples.batches, samples.fingerprint)
        kind.inspect(self.trainer, self.module, self.samples)
        if found is not None:
            return kind.solved(self.trainer, self.module, found)
        return kind.collect(self.trainer, self.module, now._blocks(), len(self.samples))

    def beside(self, name: str) -> Tensor | None:
        """Return what was found beside the losses, by its name; None if this fit has scored nothing of the kind."""
        return None if self._result is None else self._result.get(name)

    def to_keep(self) -> dict[str, Tensor]:
        """Return the tensors that a later fit needs from the file, beside the weights."""
        if self._result is None or self._checked is None:
            return {}
        index, values = self._checked
        result = {f"result/{name}": value for name, value in self._result.items() if name not in ("losses", "offsets")}
        return {**result, "checked/index": index, "checked/values": values}

    def forget_blocks(self) -> None:
        """Remove the blocks of a finished scoring: its file is written."""
        if (store := self._store) is not None and not self.is_from_file:
            on_rank_zero(self.trainer, store.clear)

    def _from_file(self) -> dict[str, Tensor] | None:
        """Return the result in the file if it is still true, after scoring a few batches anew."""
        file, expected = self.file, self.fingerprint
        if file is None:
            return None
        found: Any = from_rank_zero(self.trainer, lambda: read_file(file, self.kind, expected))
        if found is None:
            return None
        if isinstance(found, str):
            rank_zero_warn(f"{file} is not used: {found}. Scoring anew.")
            return None
        result, checked = found
        now = rows_of(self.kind, self._run(batches_to_check(self.samples.batches)))
        if why := first_difference(checked, now):
            rank_zero_warn(f"{file} is no longer true: {why}. Scoring anew.")
            return None
        rank_zero_info(f"FLOW: {file} is still true, so {len(self.samples)} samples need no scoring.")
        self.is_from_file, self._checked = True, checked
        return result  # type: ignore[no-any-return]

    def _of_frozen(self) -> list[Block] | None:
        """Return the features of a folder that fits share, with the labels of this one."""
        shares = self.frozen.folder is not None and self.file is None and type(self.kind) is ProbeFeatures
        found = self.frozen.features("training", self.samples.loader, self.kind.description) if shares else None
        return None if found is None else [Block(len(self.samples.batches), (torch.arange(len(found[0])), *found))]

    def _score(self, blocks: Iterable[Block]) -> dict[str, Tensor]:
        """Turn all blocks into the result, and note the values of the batches that a later fit checks."""
        wanted = torch.tensor([index for batch in batches_to_check(self.samples.batches) for index in batch])
        noted: list[Rows] = []

        def noting() -> Iterator[Block]:
            for block in blocks:
                noted.append(rows_of(self.kind, [block], wanted))
                yield block

        result = self.kind.collect(self.trainer, self.module, noting(), len(self.samples))
        index, values = map(torch.cat, zip(*noted))
        order = index.argsort(stable=True)
        self._checked = index[order], values[order]
        return result

    def _blocks(self) -> Iterator[Block]:
        """Yield the blocks of an interrupted scoring that are still true, then those that are missing."""
        store, batches, done = self._store, self.samples.batches, 0
        if store is None:
            yield from self._run(batches)
            return
        earlier = store.blocks(batches)
        while (block := from_rank_zero(self.trainer, lambda: next(earlier, None))) is not None:
            first = rows_of(self.kind, self._run(batches[done : done + 1]))
            if why := first_difference(rows_of(self.kind, [block], first[0]), first):
                rank_zero_warn(f"Blocks of {self.file} are no longer true: {why}. Scoring them anew.")
                break
            done = block.end
            yield block
        for block in self._run(batches, done):
            on_rank_zero(self.trainer, partial(store.add, done, block))
            done = block.end
            yield block

    def _run(self, batches: Sequence[Any], done: int = 0) -> Iterator[Block]:
        values, loader = partial(self.kind.values, self.module), self.samples.loader
        with self.kind.context(self.trainer, self.module):
            yield from score_blocks(self.trainer, self.module, loader, batches, values, self.kind.description, done)

    @property
    def _store(self) -> BlockStore | None:
        key = json.dumps([self.kind.name, self.fingerprint])
        return None if self.file is None else BlockStore(self.file, key)
