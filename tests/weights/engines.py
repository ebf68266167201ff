"""Models with SGLang's kind of load_weights: fused, sharded, padded, tied, cast."""

from __future__ import annotations

import torch
from torch import nn


class Fused(nn.Module):
    """q, k → one qk parameter; up over experts → one 3-D parameter; a padded embedding.

    rank, ranks: rows of q, k, up and embed and columns of down are this rank's share.
    """

    def __init__(self, rank=0, ranks=1, dtype=torch.float32):
        super().__init__()
        self.rank, self.ranks = rank, ranks
        self.qk = nn.Parameter(torch.zeros(2 * 8 // ranks, 12, dtype=dtype), requires_grad=False)
        self.up = nn.Parameter(torch.zeros(4, 6 // ranks, 12, dtype=dtype), requires_grad=False)
        self.down = nn.Parameter(torch.zeros(12, 8 // ranks, dtype=dtype), requires_grad=False)
        self.norm = nn.Parameter(torch.zeros(12, dtype=dtype), requires_grad=False)
        self.embed = nn.Parameter(torch.ones(16 // ranks, 12, dtype=dtype), requires_grad=False)
        self.calls = 0

    @staticmethod
    def checkpoint(seed, dtype=torch.float32):
        gen = torch.Generator().manual_seed(seed)
        shapes = {
            "q.weight": (8, 12),
            "k.weight": (8, 12),
            **{f"experts.{e}.up.weight": (6, 12) for e in range(4)},
            "down.weight": (12, 8),
            "norm.weight": (12,),
            "embed.weight": (13, 12),
        }
        return {n: torch.randn(s, generator=gen).to(dtype) for n, s in shapes.items()}

    def share(self, tensor, dim):
        size = tensor.shape[dim] // self.ranks
        return tensor.narrow(dim, self.rank * size, size)

    def load_weights(self, weights):
        self.calls += 1
        for name, loaded in weights:
            if name in ("q.weight", "k.weight"):
                part = self.share(loaded, 0)
                rows = self.qk.shape[0] // 2
                target = self.qk.data.narrow(0, 0 if name == "q.weight" else rows, rows)
            elif name.startswith("experts."):
                target, part = self.up.data[int(name.split(".")[1])], self.share(loaded, 0)
            elif name == "down.weight":
                target, part = self.down.data, self.share(loaded, 1)
            elif name == "norm.weight":
                target, part = self.norm.data, loaded
            elif name == "embed.weight":
                rows = self.embed.shape[0]
                part = loaded[self.rank * rows : (self.rank + 1) * rows]
                target = self.embed.data[: part.shape[0]]
                self.embed.data[part.shape[0] :].fill_(0)
            else:
                continue
            assert target.shape == part.shape, f"{name}: {tuple(part.shape)}"
            target.copy_(part)

    def wanted(self, weights):
        """What load_weights makes of them."""
        other = Fused(self.rank, self.ranks, self.qk.dtype)
        other.load_weights(weights.items())
        return other.state_dict()


class Raising(Fused):
    armed = True

    def load_weights(self, weights):
        def some():
            for count, pair in enumerate(weights):
                if count == 3 and self.armed:
                    raise RuntimeError("no more")
                yield pair

        super().load_weights(some())


class Scaled(Fused):
    """Computes with one tensor: that one cannot be planned."""

    def load_weights(self, weights):
        super().load_weights((n, t * 2 if n == "norm.weight" else t) for n, t in weights)


class Forgetful(Fused):
    """From its second pass on, load_weights does something else than what was recorded."""

    def load_weights(self, weights):
        weights = list(weights)
        super().load_weights(weights)
        if self.calls > 2 and len(weights) > 1:
            self.norm.data.add_(1)


class Derived(Fused):
    """A tensor made from others after loading, as MLA's w_kc."""

    def __init__(self):
        super().__init__()
        self.w_kc = torch.zeros(16, 12)

    def load_weights(self, weights):
        super().load_weights(weights)
        self.post_load_weights()

    def post_load_weights(self):
        self.w_kc.copy_(self.qk.data * 3)


class Rebinding(Fused):
    def load_weights(self, weights):
        self.norm.data = self.norm.data.clone()
        super().load_weights(weights)


class Named(nn.Module):
    """Takes tensors under its own names and skips the others: a pipeline stage, or a draft."""

    def __init__(self, **tensors):
        super().__init__()
        self.calls = 0
        for name, value in tensors.items():
            if not isinstance(value, nn.Parameter):  # else another model's
                value = nn.Parameter(torch.zeros(value), requires_grad=False)
            self.register_parameter(name, value)

    def load_weights(self, weights):
        self.calls += 1
        own = dict(self.named_parameters())
        for name, loaded in weights:
            if name in own and name not in self.skipped:
                own[name].data.copy_(loaded)

    skipped: frozenset[str] = frozenset()


class Tied(Named):
    """A draft that leaves its embedding to the target, whose it is."""

    skipped = frozenset({"embed"})
