"""Tensor, pipeline and expert parallelism, two ranks each, at once."""

import torch
import torch.distributed as dist
from harness import check, main
from toy_megatron import VOCAB, build, checkpoint

from pyrlk.weights import gather


@check
def tp2_pp2_ep2_is_whole_again():
    """Experts over the data-parallel ranks, each cut by tensor parallelism."""
    whole = checkpoint()
    grid = torch.arange(8).view(2, 2, 2)  # stage, data (and expert), tensor
    mine = {}
    for axis, name in enumerate(("stage", "expert", "tensor")):
        for row in grid.movedim(axis, -1).reshape(-1, 2).tolist():
            group = dist.new_group(row)
            if dist.get_rank() in row:
                mine[name] = group
    places = {name: (dist.get_rank(group), 2) for name, group in mine.items()}
    for grouped in (False, True):
        model = build(whole, grouped=grouped, expert_tensor=places["tensor"], **places)
        gathered = gather.megatron(
            model, vocab_size=VOCAB, tensor_group=mine["tensor"], expert_group=mine["expert"],
            expert_tensor_group=mine["tensor"],
        )  # fmt: skip
        for receivers in ([0], [1, 6], range(8)):
            seen = {}
            for tensors in gathered.stream(30_000, receive=dist.get_rank() in receivers):
                seen |= {name: tensor.clone() for name, tensor in tensors.items()}
            assert seen.keys() == (whole.keys() if dist.get_rank() in receivers else set())
            assert all(torch.equal(tensor, whole[name]) for name, tensor in seen.items())


if __name__ == "__main__":
    main()
