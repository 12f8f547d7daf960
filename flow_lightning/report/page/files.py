"""What a run has left in its directory, whole or in part, and the names of what is missing.

In: a directory. Out: `RunFiles`. Next: `run_page.py`.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flow_lightning.callbacks.flow_weighting import WEIGHTS_FILE
from flow_lightning.method.weights import SampleWeights, TokenWeights
from flow_lightning.report.label_issues import ISSUES_FILE
from flow_lightning.report.metrics import Metrics, read_metrics
from flow_lightning.report.page.evidence import EVIDENCE_FILE, Evidence

_CONFIGURATIONS = ("config.yaml", "hparams.yaml")


@dataclass
class RunFiles:
    """The content of a run's files; what is absent is empty, and `missing` says so."""

    folder: Path
    metrics: Metrics = field(default_factory=dict)
    weights: SampleWeights | TokenWeights | None = None
    evidence: Evidence = field(default_factory=Evidence)
    issues: dict[int, dict[str, str]] = field(default_factory=dict)  #: rows of `label_issues.csv` by index
    configuration: str = ""
    missing: list[str] = field(default_factory=list)

    @property
    def labels(self) -> Tensor | None:
        """Class indices of the training samples, `[n]`."""
        labels = self.evidence.tensors.get("labels")
        fits = labels is not None and (self.weights is None or len(labels) == len(self.weights))
        return labels if fits else None

    @property
    def holds_texts(self) -> bool:
        """Whether the training samples are texts without labels, as of a language model."""
        seen = self.evidence
        return (
            isinstance(self.weights, TokenWeights)
            or "text/length" in seen.tensors
            or any("tokens" in sample for sample in seen.shown.values())
        )

    def source(self, index: int) -> str | None:
        """Return where a text comes from; None if that is not known."""
        ranks, names = self.evidence.tensors.get("text/source"), self.evidence.words.get("sources") or []
        if ranks is None or index >= len(ranks):
            return None
        return str(names[ranks[index]]) if ranks[index] < len(names) else "other sources"

    def name(self, label: Any, names: str = "class_names") -> str:
        """Return the name of a class index; anything else, and an index without a name, as it is."""
        known, text = self.evidence.words.get(names) or [], str(label)
        if isinstance(label, str) and label in known:  # a name may look like an index
            return label
        return str(known[int(text)]) if text.isdecimal() and int(text) < len(known) else text


def read_run(folder: Path) -> RunFiles:
    """Read what there is of a run; a damaged file counts as missing, and is named."""
    run = RunFiles(folder)
    readers: dict[str, tuple[Callable[[Path], Any], str, str]] = {
        "metrics.json": (read_metrics, "metrics", "the run has measured nothing yet"),
        WEIGHTS_FILE: (_weights, "weights", "the run has no FLOW weights, or has not come so far"),
        EVIDENCE_FILE: (
            lambda file: Evidence.load(file.parent),
            "evidence",
            "no labels, pictures, texts or curve: the run had no ReportCallback",
        ),
        ISSUES_FILE: (_issues, "issues", "no suspected label errors"),
    }
    for name, (read, attribute, without) in readers.items():
        file = folder / name
        if not file.exists() and name == ISSUES_FILE and run.holds_texts:
            continue  # nobody looks for wrong labels there
        if not file.exists():
            run.missing.append(f"{name}: {without}.")
            continue
        try:
            setattr(run, attribute, read(file))
        except (ValueError, KeyError) as error:
            run.missing.append(f"{name} is damaged: {error}")
    found = [folder / name for name in _CONFIGURATIONS if (folder / name).exists()]
    run.configuration = found[0].read_text(encoding="utf-8", errors="replace") if found else ""
    if not found:
        run.missing.append("config.yaml: the command line writes it, a Trainer of your own does not.")
    if run.metrics and "time/after_s" not in run.metrics:
        run.missing.append("Results after training: the run was stopped, is still training, or measured nothing.")
    return run


def _weights(file: Path) -> SampleWeights | TokenWeights:
    try:
        with safe_open(file, framework="pt") as content:
            kind = (content.metadata() or {}).get("format")
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return TokenWeights.load(file) if kind == TokenWeights.file_format else SampleWeights.load(file)


def _issues(file: Path) -> dict[int, dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return {int(row["index"]): row for row in csv.DictReader(lines)}


def sample_means(weights: SampleWeights | TokenWeights) -> tuple[Tensor, Tensor]:
    """Return losses and weights of samples, `[n]` each; of tokens the mean over those of a sample."""
    both = (weights.losses.float(), weights.weights.float())
    if not isinstance(weights, TokenWeights):
        return both
    lengths = weights.offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    losses, shares = (torch.zeros(len(lengths)).index_add_(0, owner, each) / lengths.clamp_min(1) for each in both)
    return losses, shares
