"""A source of weights for a group, and what all of its ranks must agree on."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist

from pyrlk import weights
from pyrlk.weights import layout as layouts
from pyrlk.weights import source


class Scattered(source.Sharded):
    """Tensor i lies on rank i mod ranks; a bucket is one reduction of bytes."""

    def __init__(self, tensors, group=None):
        self.group = group or dist.group.WORLD
        self.tensors = tensors
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.collectives = 0
        self.before = lambda bucket: None
        self.after = lambda flat: None

    def specs(self):
        return [layouts.Spec(n, tuple(t.shape), t.dtype) for n, t in self.tensors.items()]

    def start(self, layout, bucket, out, *, checksum=True):
        self.before(bucket)
        self.collectives += 1
        flat = torch.zeros(layout.buckets[bucket], dtype=torch.uint8)
        for i in layout.pieces[bucket]:
            entry = layout.entries[i]
            if list(self.tensors).index(entry.name) % self.ranks == self.rank:
                data = self.tensors[entry.name].contiguous().view(-1).view(torch.uint8)
                flat[entry.offset : entry.offset + entry.nbytes] = data
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        return Reduction(self, work, flat, layout, bucket, out, checksum)


class Reduction(source.Work):
    def __init__(self, source, work, flat, layout, bucket, out, checksum):
        self.source, self.work, self.flat = source, work, flat
        self.layout, self.bucket = layout, bucket
        self.out, self.checksum = out, checksum

    def wait(self, timeout):
        try:
            self.work.wait(datetime.timedelta(seconds=timeout))
        except RuntimeError as error:
            late = "imed out" in str(error)
            raise (weights.Timeout if late else weights.PeerLost)(str(error)[:200]) from None
        if self.out is None:
            return None
        self.out.flat[: self.flat.numel()] = self.flat
        self.source.after(self.out.flat)
        return self.out.sums(self.layout.ranges[self.bucket], threads=1) if self.checksum else None


def everywhere(value):
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    assert all(one == every[0] for one in every), every
    return every[0]


def raised(kind, match, call):
    """The same error on every rank."""
    with pytest.raises(kind, match=match) as caught:
        call()
    return everywhere((type(caught.value).__name__, str(caught.value), caught.value.dirty))
