"""Checkpoints: readers that prove headers first and read tensors on request, and a streaming writer.

Reading is by pread into fresh tensors, not by mmap, and writing goes straight to the final offsets, so that memory
holds what was asked for and nothing else.
"""

from isomerge.checkpoint.folder import CHECKSUMS, open_checkpoint
from isomerge.checkpoint.format import TensorSpec
from isomerge.checkpoint.ledger import Receipt
from isomerge.checkpoint.memory import MemoryWriter, from_state_dict
from isomerge.checkpoint.reader import Checkpoint, TensorInfo
from isomerge.checkpoint.single import write_safetensors
from isomerge.checkpoint.staging import disk_bytes, hidden_folder
from isomerge.checkpoint.sums import sha256_of
from isomerge.checkpoint.writer import Writer

__all__ = [
    "CHECKSUMS",
    "Checkpoint",
    "MemoryWriter",
    "Receipt",
    "TensorInfo",
    "TensorSpec",
    "Writer",
    "disk_bytes",
    "from_state_dict",
    "hidden_folder",
    "open_checkpoint",
    "sha256_of",
    "write_safetensors",
]
