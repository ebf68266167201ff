"""Names and values of a transformers model: those that its save_pretrained writes."""

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from pyrlk import weights
from pyrlk.weights import gather

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def make(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
        return transformers.MixtralForCausalLM(config)
    if kind == "moe":
        config = transformers.Qwen3MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
        )
        return transformers.Qwen3MoeForCausalLM(config)
    config = transformers.Qwen3Config(**SIZES, tie_word_embeddings=kind == "tied")
    return transformers.Qwen3ForCausalLM(config)


KINDS = ("dense", "tied", "moe", "mixtral")


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_values_are_those_of_the_saved_checkpoint(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    gathered = dict(gather.hf(model))
    assert gathered.keys() == saved.keys()
    for name, tensor in gathered.items():
        assert torch.equal(tensor, saved[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_copied(kind):
    model = make(kind)
    gathered = dict(gather.hf(model))
    for parameter in model.parameters():
        parameter.data.fill_(7)
    assert all(bool((tensor == 7).all()) for tensor in gathered.values())


def test_views_follow_a_parameter_that_moves():
    model = make("moe")
    checkpoint = gather.Checkpoint(model)
    with torch.no_grad():
        checkpoint.tensors()
        for parameter in model.parameters():
            parameter.data = torch.full_like(parameter, 3)
        assert all(bool((t == 3).all()) for t in checkpoint.tensors().values())


@pytest.mark.parametrize("kind", KINDS)
def test_update_takes_a_model_by_its_checkpoint_names(kind, socket_path, serving):
    trainer, engine = make(kind, 1), make(kind, 2)
    with (
        serving(weights.Receiver(engine, socket_path)),
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        for version in (1, 2):
            report = publisher.update(trainer, version=version)
            assert report.tensors == len(dict(gather.hf(trainer)))
            for ours, theirs in zip(trainer.parameters(), engine.parameters(), strict=True):
                assert torch.equal(ours, theirs)
                ours.data.add_(1)
        # The module's own names will do as well.
        publisher.update(trainer.state_dict(), version=3)
        for ours, theirs in zip(trainer.parameters(), engine.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_an_engine_gets_one_tensor_an_expert_and_projection(socket_path, serving):
    got = {}

    def load(tensors):
        got.update((name, tensor.clone()) for name, tensor in tensors)

    trainer = make("moe")
    with (
        serving(weights.Receiver(load, socket_path)),
        weights.Publisher(weights.Local(socket_path)) as publisher,
    ):
        publisher.update(trainer, version=1)
    fused = trainer.model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(got["model.layers.1.mlp.experts.3.gate_proj.weight"], fused[3, :24])
    assert torch.equal(got["model.layers.1.mlp.experts.3.up_proj.weight"], fused[3, 24:])


def test_buffers_come_by_name():
    model = make("dense")
    model.model.register_buffer("e_score_correction_bias", torch.ones(3))
    model.model.register_buffer("scratch", torch.ones(3))
    names = dict(gather.hf(model)).keys()
    assert "model.e_score_correction_bias" in names
    assert "model.scratch" not in names
    assert "model.scratch" in dict(gather.hf(model, buffers=["scratch"]))


def test_a_weight_that_is_computed_when_saved_is_refused(monkeypatch):
    model = make("dense")
    monkeypatch.setattr(gather.checkpoint, "_as_saved", lambda module, state: {"x": torch.ones(2)})
    with pytest.raises(weights.Unsupported, match="'x': transformers computes it"):
        dict(gather.hf(model))


def test_another_module_is_named():
    with pytest.raises(TypeError, match="module must be a transformers model, got Linear"):
        list(gather.hf(nn.Linear(1, 1)))
