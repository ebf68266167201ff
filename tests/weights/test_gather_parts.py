"""A view of a whole tensor, cut where the tensor is cut: the parts of all ranks make the view."""

import itertools
import random

import pytest
import torch
from torch import nn

from pyrlk import weights
from pyrlk.weights import gather
from pyrlk.weights.gather.checkpoint import View
from pyrlk.weights.gather.dtensor import Interval, parts_of


def shards(whole, cuts, chance):
    """Each rank's intervals and local tensor; those of a dimension are dealt to `cuts` ranks."""
    held = []
    for size, count in zip(whole.shape, cuts, strict=True):
        edges = sorted({0, size, *(chance.randint(0, size) for _ in range(count + 1))})
        owners = [chance.randrange(count) for _ in edges[1:]]
        of_dim = []
        for rank in range(count):
            at, intervals = 0, []
            for (start, stop), owner in zip(itertools.pairwise(edges), owners, strict=True):
                if owner == rank:
                    intervals.append(Interval(start, stop - start, at))
                    at += stop - start
            of_dim.append(intervals)
        held.append(of_dim)
    for index in (
        torch.cartesian_prod(*[torch.arange(c) for c in cuts]).view(-1, len(cuts)).tolist()
    ):
        mine = [held[d][i] for d, i in enumerate(index)]
        local = whole
        for dim, intervals in enumerate(mine):
            picked = [torch.arange(i.start, i.start + i.size) for i in intervals]
            rows = torch.cat(picked) if picked else torch.empty(0, dtype=torch.long)
            local = local.index_select(dim, rows)
        yield mine, local.contiguous()


def a_view(whole, chance):
    """Slices with steps, single indices, dimensions in any order: what a conversion may do."""
    view = whole
    for dim in reversed(range(whole.ndim)):
        size = view.shape[dim]
        kind = chance.choice(["all", "slice", "step", "one"])
        if kind == "slice":
            start = chance.randrange(size)
            view = view.narrow(dim, start, chance.randint(1, size - start))
        elif kind == "step":
            start = chance.randrange(min(2, size))
            index = [slice(None)] * view.ndim
            index[dim] = slice(start, None, 2)
            view = view[tuple(index)]
        elif kind == "one" and view.ndim > 1:
            view = view.select(dim, chance.randrange(size))
    order = list(range(view.ndim))
    chance.shuffle(order)
    return view.permute(order)


@pytest.mark.parametrize("seed", range(300))
def test_parts_of_all_ranks_make_the_view(seed):
    chance = random.Random(seed)
    shape = tuple(chance.randint(1, 7) for _ in range(chance.randint(1, 4)))
    whole = torch.randperm(torch.Size(shape).numel()).view(shape)
    wanted = a_view(whole, chance)
    view = View("w", int(wanted.storage_offset()), wanted.size(), wanted.stride())
    got = torch.full_like(wanted, -1)
    cuts = [chance.randint(1, 3) for _ in shape]
    for held, local in shards(whole, cuts, chance):
        for start, part in parts_of("name", view, shape, held, local):
            place = got[tuple(slice(a, a + n) for a, n in zip(start, part.shape, strict=True))]
            assert (place == -1).all(), "two parts overlap"
            place.copy_(part)
    assert torch.equal(got, wanted)


def test_a_view_that_is_no_box_of_a_sharded_tensor_is_refused():
    whole = torch.arange(24).view(4, 6)
    diagonal = View("w", 0, torch.Size([4]), (7,))
    half = [[Interval(0, 2, 0)], [Interval(0, 6, 0)]]
    with pytest.raises(weights.Unsupported, match="'name' is no box of 'w', which is sharded"):
        parts_of("name", diagonal, (4, 6), half, whole[:2])


def test_one_process_gathers_without_a_group():
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    gathered = gather.dtensor(module)
    seen = {name: t.clone() for tensors in gathered.stream(64) for name, t in tensors.items()}
    state = module.state_dict()
    assert seen.keys() == state.keys()
    assert all(torch.equal(seen[name], tensor) for name, tensor in state.items())


def test_numbers_and_empty_tensors_come_too():
    module = nn.Module()
    module.register_buffer("steps", torch.tensor(7))
    module.register_buffer("none", torch.empty(0, 3))
    seen = next(iter(gather.dtensor(module).stream()))
    assert seen["steps"] == 7
    assert seen["steps"].shape == ()
    assert seen["none"].shape == (0, 3)
