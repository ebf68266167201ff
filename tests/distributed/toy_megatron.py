"""A model of Megatron's parameter names and attributes, cut from a whole checkpoint.

Written from the whole to the parts, where pyrlk.weights.gather.megatron goes from the parts to the
whole: both were written from Megatron's conventions, and share no code.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

CONFIG = SimpleNamespace(num_attention_heads=8, num_query_groups=4, kv_channels=8)
HIDDEN, INNER, VOCAB, LAYERS, EXPERTS = 32, 24, 101, 4, 4


def checkpoint(seed=0, dtype=torch.bfloat16):
    """Names and values of a Qwen3-MoE with one dense layer, and biases of Qwen2."""
    g = torch.Generator().manual_seed(seed)
    heads, groups, dim = CONFIG.num_attention_heads, CONFIG.num_query_groups, CONFIG.kv_channels
    whole = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for part, rows in (("q", heads * dim), ("k", groups * dim), ("v", groups * dim)):
            whole[f"{at}.self_attn.{part}_proj.weight"] = rows, HIDDEN
            whole[f"{at}.self_attn.{part}_proj.bias"] = (rows,)
        whole[f"{at}.self_attn.o_proj.weight"] = HIDDEN, heads * dim
        whole[f"{at}.self_attn.q_norm.weight"] = whole[f"{at}.self_attn.k_norm.weight"] = (dim,)
        whole[f"{at}.input_layernorm.weight"] = (HIDDEN,)
        whole[f"{at}.post_attention_layernorm.weight"] = (HIDDEN,)
        mlps = [f"{at}.mlp"] if layer == 0 else [f"{at}.mlp.experts.{e}" for e in range(EXPERTS)]
        if layer:
            whole[f"{at}.mlp.gate.weight"] = EXPERTS, HIDDEN
            whole[f"{at}.mlp.gate.e_score_correction_bias"] = (EXPERTS,)
        for mlp in mlps:
            whole[f"{mlp}.gate_proj.weight"] = whole[f"{mlp}.up_proj.weight"] = INNER, HIDDEN
            whole[f"{mlp}.down_proj.weight"] = HIDDEN, INNER
    whole["model.norm.weight"] = (HIDDEN,)
    whole["lm_head.weight"] = VOCAB, HIDDEN
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in whole.items()}


class Layer(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.layer_number = number


def put(module, name, tensor, dim=None, stride=1, buffer=False):
    """Register `tensor` under a dotted name, with Megatron's attributes."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if buffer:
        module.register_buffer(last, tensor.clone())
        return
    parameter = nn.Parameter(tensor.clone(), requires_grad=False)
    parameter.tensor_model_parallel = dim is not None
    parameter.partition_dim = -1 if dim is None else dim
    parameter.partition_stride = stride
    module.register_parameter(last, parameter)


def share(tensor, dim, place):
    rank, ranks = place
    return tensor.chunk(ranks, dim)[rank]


def build(whole, *, tensor=(0, 1), stage=(0, 1), expert=(0, 1), expert_tensor=(0, 1),
          grouped=False, tied=False, config=CONFIG):  # fmt: skip
    """One rank's stage of a checkpoint. Each place is (rank, ranks)."""
    model = nn.Module()
    model.config = config
    model.share_embeddings_and_output_weights = tied
    vocab = whole["model.embed_tokens.weight"].shape[0]
    padded = -(-vocab // (8 * tensor[1])) * 8 * tensor[1]

    def head(name, source):
        rows = torch.cat([source, source.new_full((padded - vocab, source.shape[1]), 7.0)])
        put(model, name, share(rows, 0, tensor), 0)

    def mlp(at, source, place, weight=".weight"):
        gate, up, down = (whole[f"{source}.{k}_proj.weight"] for k in ("gate", "up", "down"))
        fc1 = torch.cat([share(gate, 0, place), share(up, 0, place)])
        put(model, f"{at}.linear_fc1{weight}", fc1, 0, 2)
        # As grouped experts have it: partition_dim 0 for what is cut along 1.
        put(model, f"{at}.linear_fc2{weight}", share(down, 1, place), 0 if grouped else 1)

    if stage[0] == 0:
        head("embedding.word_embeddings.weight", whole["model.embed_tokens.weight"])
    layers = sum(name.endswith("input_layernorm.weight") for name in whole)
    per_stage = layers // stage[1]
    model.decoder = nn.Module()
    model.decoder.layers = nn.ModuleList(
        [Layer(1 + stage[0] * per_stage + i) for i in range(per_stage)]
    )
    for i in range(per_stage):
        at, layer = f"decoder.layers.{i}", stage[0] * per_stage + i
        source = f"model.layers.{layer}"
        for kind in ("weight", "bias"):
            if f"{source}.self_attn.q_proj.{kind}" not in whole:
                continue
            q, k, v = (whole[f"{source}.self_attn.{p}_proj.{kind}"] for p in "qkv")
            groups = config.num_query_groups
            fused = [
                torch.cat([qs, ks, vs])
                for qs, ks, vs in zip(
                    q.chunk(groups), k.chunk(groups), v.chunk(groups), strict=True
                )
            ]
            put(model, f"{at}.self_attention.linear_qkv.{kind}",
                share(torch.cat(fused), 0, tensor), 0)  # fmt: skip
        put(model, f"{at}.self_attention.linear_proj.weight",
            share(whole[f"{source}.self_attn.o_proj.weight"], 1, tensor), 1)  # fmt: skip
        for name, theirs in (
            ("self_attention.q_layernorm.weight", "self_attn.q_norm.weight"),
            ("self_attention.k_layernorm.weight", "self_attn.k_norm.weight"),
            ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
            ("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
        ):
            put(model, f"{at}.{name}", whole[f"{source}.{theirs}"])
        if f"{source}.mlp.gate_proj.weight" in whole:
            mlp(f"{at}.mlp", f"{source}.mlp", tensor)
            continue
        put(model, f"{at}.mlp.router.weight", whole[f"{source}.mlp.gate.weight"])
        bias = whole.get(f"{source}.mlp.gate.e_score_correction_bias")
        if bias is not None:
            put(model, f"{at}.mlp.router.expert_bias", bias, buffer=True)
        here = whole[f"{source}.mlp.gate.weight"].shape[0] // expert[1]
        for e in range(here):
            theirs = f"{source}.mlp.experts.{expert[0] * here + e}"
            if grouped:
                mlp(f"{at}.mlp.experts", theirs, expert_tensor, f".weight{e}")
            else:
                mlp(f"{at}.mlp.experts.local_experts.{e}", theirs, expert_tensor)
    if stage[0] == stage[1] - 1:
        put(model, "decoder.final_layernorm.weight", whole["model.norm.weight"])
        head("output_layer.weight", whole["lm_head.weight"])
    return model
