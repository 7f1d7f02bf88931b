"""Stored files → `TensorSpec`s. A checkpoint knows where bytes are, not what they mean.

Only headers and small JSON files are read here, and everything read is taken for hostile: sizes are checked before
they are allocated, names before they become paths, and every contradiction is an error naming the file.
"""

from llmfp.checkpoint.directory import open_checkpoint
from llmfp.checkpoint.specs import Checkpoint, LoraSpec, Shard, TensorSpec

__all__ = ["Checkpoint", "LoraSpec", "Shard", "TensorSpec", "open_checkpoint"]
