"""Instructions and responses for supervised fine-tuning: read, put into a prompt, tokenised, batched.

In: a file or the name of a data set. Out: `InstructionDataModule`. Next: `records.py`, `prompts.py`, `dataset.py`,
`module.py`, in this order.
"""

from flow_lightning.data.instructions.dataset import InstructionDataset, collate
from flow_lightning.data.instructions.module import InstructionDataModule
from flow_lightning.data.instructions.records import read_records
from flow_lightning.method.losses import IGNORED

__all__ = ["IGNORED", "InstructionDataModule", "InstructionDataset", "collate", "read_records"]
