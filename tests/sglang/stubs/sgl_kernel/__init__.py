"""The few sgl_kernel names that SGLang's CPU path imports without asking; it has no CPU wheel.

Without AMX, SGLang computes everything else in plain torch.
"""

import torch

__version__ = "0+stub"
_UNUSED = {
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
}


def assign_req_to_token_pool_cpu(
    pool_indices: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    slots: torch.Tensor,
    pool_len: int | None = None,
) -> None:
    """table[r, start:end] = the next end − start of slots, for each request r."""
    done = 0
    rows = zip(pool_indices.tolist(), starts.tolist(), ends.tolist(), strict=True)
    for row, start, end in rows:
        table[row, start:end] = slots[done : done + end - start].to(table.dtype)
        done += end - start


def __getattr__(name: str):
    if name not in _UNUSED:
        raise AttributeError(name)

    def unused(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is not needed by the models of these tests")

    return unused
