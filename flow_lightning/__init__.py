"""Fine-tune without forgetting, for PyTorch Lightning."""

from flow_lightning.callbacks.flow_weighting import FlowWeightingCallback
from flow_lightning.callbacks.linear_probe import LinearProbeCallback
from flow_lightning.callbacks.resumable_checkpoint import ResumableCheckpoint
from flow_lightning.callbacks.retention import RetentionCallback
from flow_lightning.callbacks.save_pretrained import SavePretrainedCallback
from flow_lightning.data.images import ImageDataModule
from flow_lightning.data.indexing import IndexedDataset, IndexedSample
from flow_lightning.data.instructions import InstructionDataModule
from flow_lightning.files import AtomicCheckpointIO
from flow_lightning.method.flow import effective_sample_size, flow_weights, keep_below, temperature
from flow_lightning.method.objective import weighted_loss
from flow_lightning.method.weights import SampleWeights, TokenWeights
from flow_lightning.modules.base import WeightedLossModule
from flow_lightning.modules.causal_language import CausalLanguageModule
from flow_lightning.modules.image_classification import ImageClassificationModule

__all__ = [
    "AtomicCheckpointIO",
    "CausalLanguageModule",
    "FlowWeightingCallback",
    "ImageClassificationModule",
    "ImageDataModule",
    "IndexedDataset",
    "IndexedSample",
    "InstructionDataModule",
    "LinearProbeCallback",
    "ResumableCheckpoint",
    "RetentionCallback",
    "SampleWeights",
    "SavePretrainedCallback",
    "TokenWeights",
    "WeightedLossModule",
    "effective_sample_size",
    "flow_weights",
    "keep_below",
    "temperature",
    "weighted_loss",
]
__version__ = "0.1.0"
