"""Instructions and responses for supervised fine-tuning: read, put into a prompt, tokenised, batched.

In: a file or the name of a data set. Out: `InstructionDataModule`. Next: `records.py`, `prompts.py`, `dataset.py`.
"""

from flow_lightning.data.instructions.dataset import InstructionDataset, collate, join
from flow_lightning.data.instructions.module import InstructionDataModule

__all__ = ["InstructionDataModule", "InstructionDataset", "collate", "join"]
