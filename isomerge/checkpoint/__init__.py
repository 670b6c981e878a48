"""Checkpoints: readers that prove headers first and read tensors on request, and a streaming writer.

Reading is by pread into fresh tensors, not by mmap, and writing goes straight to the final offsets, so that memory
holds what was asked for and nothing else.
"""

from isomerge.checkpoint.folder import open_checkpoint
from isomerge.checkpoint.format import TensorSpec
from isomerge.checkpoint.memory import MemoryWriter, from_state_dict
from isomerge.checkpoint.reader import Checkpoint, TensorInfo
from isomerge.checkpoint.single import write_safetensors
from isomerge.checkpoint.writer import Writer

__all__ = [
    "Checkpoint",
    "MemoryWriter",
    "TensorInfo",
    "TensorSpec",
    "Writer",
    "from_state_dict",
    "open_checkpoint",
    "write_safetensors",
]
