"""What RetentionCallback can measure. `base.py` first, then one file for each kind of data."""

from flow_lightning.measures.answers import Answers
from flow_lightning.measures.base import Measure, Metric, Panel
from flow_lightning.measures.harness import HarnessTasks, TargetTasks
from flow_lightning.measures.images import PretrainedImages, TargetAccuracy
from flow_lightning.measures.text import GeneralText, TargetLoss

#: All measures of this library. Of what was learned, and of what was kept, the first that has a value leads.
MEASURES = (TargetAccuracy, PretrainedImages, Answers, TargetTasks, TargetLoss, HarnessTasks, GeneralText)

__all__ = [
    "MEASURES",
    "Answers",
    "GeneralText",
    "HarnessTasks",
    "Measure",
    "Metric",
    "Panel",
    "PretrainedImages",
    "TargetAccuracy",
    "TargetLoss",
    "TargetTasks",
]
