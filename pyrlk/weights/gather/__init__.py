"""From a trainer's modules to the names and tensors of their checkpoint.

hf        a transformers model of one process: views, nothing is copied
"""

from .checkpoint import BUFFERS, Checkpoint, hf, is_hf, saved_forms

__all__ = ["BUFFERS", "Checkpoint", "hf", "is_hf", "saved_forms"]
