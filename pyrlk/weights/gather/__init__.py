"""From a trainer's modules to the names and tensors of their checkpoint.

hf        a transformers model of one process: views, nothing is copied
dtensor   FSDP2 and DTensor, and modules that every rank has whole
megatron  tensor, pipeline and expert parallelism by Megatron's conventions

The last two are collective over a group: parts → whole tensors, one collective a bucket.
"""

from .checkpoint import BUFFERS, Checkpoint, hf, is_hf, saved_forms
from .dtensor import dtensor
from .exchange import Gathered
from .megatron import RULES, Rule, Share, Slab, gate_up, megatron, qkv, vocabulary, whole

__all__ = [
    "BUFFERS",
    "RULES",
    "Checkpoint",
    "Gathered",
    "Rule",
    "Share",
    "Slab",
    "dtensor",
    "gate_up",
    "hf",
    "is_hf",
    "megatron",
    "qkv",
    "saved_forms",
    "vocabulary",
    "whole",
]
