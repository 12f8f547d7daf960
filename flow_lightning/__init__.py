"""Fine-tune without forgetting, for PyTorch Lightning.

Names are imported when they are first used: `import flow_lightning` alone loads neither torch nor Lightning.
"""

import ast
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:  # the public names: type checkers and editors see imports, and `_HOME` reads them
    from flow_lightning.callbacks.averaging import SequentialAveragingCallback as SequentialAveragingCallback
    from flow_lightning.callbacks.distillation import DistillationCallback as DistillationCallback
    from flow_lightning.callbacks.early_learning import EarlyLearningCallback as EarlyLearningCallback
    from flow_lightning.callbacks.flow_weighting import FlowWeightingCallback as FlowWeightingCallback
    from flow_lightning.callbacks.linear_probe import LinearProbeCallback as LinearProbeCallback
    from flow_lightning.callbacks.online_weights import LossAdaptiveRateCallback as LossAdaptiveRateCallback
    from flow_lightning.callbacks.online_weights import OnlineWeightsCallback as OnlineWeightsCallback
    from flow_lightning.callbacks.report import ReportCallback as ReportCallback
    from flow_lightning.callbacks.retention import RetentionCallback as RetentionCallback
    from flow_lightning.callbacks.retention_budget import RetentionBudgetCallback as RetentionBudgetCallback
    from flow_lightning.callbacks.save_pretrained import SavePretrainedCallback as SavePretrainedCallback
    from flow_lightning.callbacks.stay_near import StayNearCallback as StayNearCallback
    from flow_lightning.callbacks.text_anchor import TextAnchorCallback as TextAnchorCallback
    from flow_lightning.data.edited import KeptSampler as KeptSampler
    from flow_lightning.data.edited import apply_edits as apply_edits
    from flow_lightning.data.images import ImageDataModule as ImageDataModule
    from flow_lightning.data.indexing import IndexedDataset as IndexedDataset
    from flow_lightning.data.indexing import IndexedSample as IndexedSample
    from flow_lightning.data.instructions import InstructionDataModule as InstructionDataModule
    from flow_lightning.files import AtomicCheckpointIO as AtomicCheckpointIO
    from flow_lightning.method.flow import effective_sample_size as effective_sample_size
    from flow_lightning.method.flow import flow_weights as flow_weights
    from flow_lightning.method.flow import keep_below as keep_below
    from flow_lightning.method.flow import temperature as temperature
    from flow_lightning.method.objective import weighted_loss as weighted_loss
    from flow_lightning.method.weights import SampleWeights as SampleWeights
    from flow_lightning.method.weights import TokenWeights as TokenWeights
    from flow_lightning.modules.base import WeightedLossModule as WeightedLossModule
    from flow_lightning.modules.causal_language import CausalLanguageModule as CausalLanguageModule
    from flow_lightning.modules.image_classification import ImageClassificationModule as ImageClassificationModule
    from flow_lightning.resume import ExactResumeCallback as ExactResumeCallback
    from flow_lightning.resume import ResumableDataLoader as ResumableDataLoader
    from flow_lightning.resume import ResumableSampler as ResumableSampler
    from flow_lightning.scoring.alone import score as score

_IMPORTS = (node for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.ImportFrom))
#: The module of each public name.
_HOME = {alias.name: f"{node.module}" for node in _IMPORTS for alias in node.names if alias.asname}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
