"""Model, codec and rollout: padding changes nothing, the engine's log-probs are the trainer's."""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import pyrlk
from pyrlk.demo.config import Config
from pyrlk.demo.learn import Batch, collate, learn
from pyrlk.demo.model import CharCodec, TextCodec, build, pad_left, response_logits
from pyrlk.demo.rollout import generate, response_seeds

UNEQUAL = ["7+5=", "37+45=", "107+5="]


@pytest.fixture(scope="module")
def small():
    return build(None, 0, "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A transformers folder of another architecture, with a tokenizer of its own."""
    path = str(tmp_path_factory.mktemp("llama"))
    vocab = {c: i for i, c in enumerate(["<e>", "<p>", "<b>", *"0123456789+="])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<p>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<e>", pad_token="<p>"
    ).save_pretrained(path)
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=0,
        pad_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_the_small_model_has_about_a_million_parameters(small):
    model, _ = small
    assert 0.8e6 < sum(p.numel() for p in model.parameters()) < 1.2e6


def test_a_folder_brings_its_own_tokenizer(folder):
    model, codec = build(folder, 0, "cpu")
    assert isinstance(codec, TextCodec)
    assert codec.decode(codec.response("82")).replace(" ", "") == "82"
    assert (codec.end, codec.pad) == (0, 1)
    assert not model.training


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("source", ["small", "folder"])
def test_a_response_does_not_depend_on_its_neighbours(request, source, temperature):
    value = request.getfixturevalue(source)
    model, codec = value if source == "small" else build(value, 0, "cpu")
    seeds = response_seeds(5, 0, len(UNEQUAL))
    options = {"temperature": temperature, "max_length": 6}
    together = generate(model, codec, UNEQUAL, seeds, **options)
    for i, prompt in enumerate(UNEQUAL):
        alone = generate(model, codec, [prompt], seeds[i : i + 1], **options)
        assert torch.equal(alone.tokens[0], together.tokens[i])
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("source", ["small", "folder"])
def test_the_scorer_agrees_with_the_sampler_on_every_token(request, source):
    value = request.getfixturevalue(source)
    model, codec = value if source == "small" else build(value, 0, "cpu")
    seeds = response_seeds(0, 0, 30)
    drawn = generate(model, codec, UNEQUAL * 10, seeds, temperature=1.0, max_length=8)
    prompt, mask = pad_left([codec.prompt(text) for text in UNEQUAL * 10], codec.pad, "cpu")
    assert mask is not None
    with torch.no_grad():
        logits = response_logits(model, prompt, mask, drawn.tokens, codec.pad)
        scored = pyrlk.token_logprobs(logits, drawn.tokens)
    torch.testing.assert_close(scored, drawn.logprobs, atol=1e-5, rtol=0)


def test_nothing_follows_the_end_of_a_response(small):
    model, codec = small
    drawn = generate(
        model, codec, ["12+34="] * 200, response_seeds(0, 0, 200), temperature=1.0, max_length=8
    )
    for row, logprobs in zip(drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True):
        length = row.index(codec.end) + 1 if codec.end in row else 8
        assert row[length:] == [-100] * (8 - length)
        assert logprobs[length:] == [0.0] * (8 - length)
        assert -100 not in row[:length]


def test_equal_seeds_draw_equal_tokens_and_other_seeds_do_not(small):
    model, codec = small
    options = {"temperature": 1.0, "max_length": 8}
    first, again, other = (
        generate(model, codec, ["12+34="] * 20, response_seeds(seed, at, 20), **options).tokens
        for seed, at in [(0, 0), (0, 0), (0, 20)]
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("algorithm", ["dapo", "grpo", "ppo", "reinforce"])
def test_learning_makes_the_rewarded_response_likelier(algorithm):
    config = Config(algorithm=algorithm, group_size=2, groups=2, lr=1e-3)
    model, codec = build(None, 0, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    batch = _two_groups(model, codec)
    before = _scores(model, codec, batch)
    metrics = learn(model, codec, optimizer, batch, config, version=0)
    gain = _scores(model, codec, batch) - before
    assert (gain[0::2] > gain[1::2]).all()
    assert metrics["logprob_gap"] < 1e-5
    assert metrics["stale"] == 0.0
    assert (metrics["ratio_max"] > 1.0) == (algorithm != "reinforce")


def _two_groups(model, codec: CharCodec) -> Batch:
    groups = []
    for prompt, right, wrong in [("37+45=", "82", "92"), ("62+71=", "133", "143")]:
        rows = [[*codec.response(text), codec.end] for text in (right, wrong)]
        tokens = torch.tensor([row + [-100] * (8 - len(row)) for row in rows])
        ids, mask = pad_left([codec.prompt(prompt)] * 2, codec.pad, "cpu")
        with torch.no_grad():
            logits = response_logits(model, ids, mask, tokens, codec.pad)
            logprobs = pyrlk.token_logprobs(logits, tokens)
        responses = {"tokens": tokens, "logprobs": logprobs, "version": 0}
        groups.append((prompt, responses, [1.0, 0.0]))
    return collate(groups)


def _scores(model, codec: CharCodec, batch: Batch) -> torch.Tensor:
    prompt, mask = pad_left([codec.prompt(text) for text in batch.prompts], codec.pad, "cpu")
    with torch.no_grad():
        logits = response_logits(model, prompt, mask, batch.tokens, codec.pad)
        return pyrlk.token_logprobs(logits, batch.tokens).sum(1)
