"""pyrlk.integrations.trl.GRPOTrainer equals trl.GRPOTrainer, on small models and the CPU.

The same model, batch and options go through both `_compute_loss`: the loss, the gradient of every
parameter and the metrics that both log. TRL's own loss never holds the logits either, so this
also compares its head with ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.peers
trl = pytest.importorskip("trl", reason="pip install pyrlk[peers]")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from pyrlk.integrations.trl import GRPOTrainer  # noqa: E402 - after the check that TRL is there

VOCAB, PROMPT, LENGTH, ROWS = 67, 3, 7, 4
BOUND = 2e-5  # float32, and two orders of summation


def tokenizer():
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    model = tokenizers.models.WordLevel(words, unk_token="<eos>")
    own = tokenizers.Tokenizer(model)
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", eos_token="<eos>"
    )


def model(kind="qwen2", **options):
    torch.manual_seed(0)
    size = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    if kind == "gemma2":
        config = transformers.Gemma2Config(
            **size, head_dim=16, final_logit_softcapping=2.0, **options
        )
        return transformers.Gemma2ForCausalLM(config)
    if kind == "mixtral":
        config = transformers.MixtralConfig(
            **size, num_local_experts=4, router_aux_loss_coef=0.1, **options
        )
        return transformers.MixtralForCausalLM(config)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**size, **options))


def rewards(completions, **_):
    return [float(len(text) % 5) for text in completions]


def trainer(kind, folder, network, **options):
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": ROWS,
        "num_generations": 2,
        "max_completion_length": LENGTH,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "epsilon_high": 0.28,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    return kind(
        model=network,
        reward_funcs=rewards,
        args=trl.GRPOConfig(**given | options),
        train_dataset=datasets.Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(40)]),
        processing_class=tokenizer(),
    )


def batch(own):
    """A micro-batch as TRL prepares it: padding on both sides, a tool's tokens, an empty row."""
    torch.manual_seed(7)
    completion = torch.randint(2, VOCAB, (ROWS, LENGTH))
    prompt_mask, mask = torch.ones(ROWS, PROMPT).long(), torch.ones(ROWS, LENGTH).long()
    prompt_mask[1, 0] = 0
    mask[1, 4:] = 0
    mask[3] = 0
    tool_mask = torch.ones_like(mask)
    tool_mask[0, 2:4] = 0
    given = {
        "prompt_ids": torch.randint(2, VOCAB, (ROWS, PROMPT)),
        "prompt_mask": prompt_mask,
        "completion_ids": completion,
        "completion_mask": mask,
        "tool_mask": tool_mask,
        "advantages": torch.tensor([1.2, -0.8, 0.0, 0.5]),
        "num_items_in_batch": torch.tensor(31),
    }
    with torch.no_grad():
        ids = torch.cat([given["prompt_ids"], completion], dim=1)
        attention = torch.cat([prompt_mask, mask], dim=1)
        logprobs, _, _ = own._get_per_token_logps_and_entropies(own.model, ids, attention, LENGTH)
    given["old_per_token_logps"] = logprobs + 0.6 * torch.randn_like(logprobs)
    given["ref_per_token_logps"] = logprobs + 0.2 * torch.randn_like(logprobs)
    if own.use_vllm:
        ratio = (torch.rand_like(logprobs) + 0.5).masked_fill(mask * tool_mask == 0, 1.0)
        ratio[0, 1] = 0.0
        given["importance_sampling_ratio"] = ratio
    return given


def result(kind, folder, network, *, without=(), evaluate=False, then=None, **options):
    """(loss, gradients by name, logged) of one micro-batch; `then` sets what a config cannot."""
    own = trainer(kind, folder, network, **options)
    own.current_gradient_accumulation_steps = 2
    for name, value in (then or {}).items():
        setattr(own, name, value)
        setattr(own.args, name, value)
    given = {k: v for k, v in batch(own).items() if k not in without}
    own.model.train(not evaluate)
    own.model.zero_grad()
    loss = own._compute_loss(own.model, given)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in own.model.named_parameters()}
    logged = {k: v[-1] for k, v in own._metrics["eval" if evaluate else "train"].items() if v}
    return loss.detach(), gradients, logged


def check(folder, network=model, *, logged=True, **options):
    """Both trainers agree; returns what ours logged."""
    theirs = result(trl.GRPOTrainer, folder, network(), **options)
    ours = result(GRPOTrainer, folder, network(), **options)
    torch.testing.assert_close(ours[0], theirs[0], rtol=BOUND, atol=1e-7)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        gap = (ours[1][name] - gradient).abs().max() / gradient.abs().max()
        assert gap <= BOUND, (name, gap)
    for name, value in ours[2].items() if logged else ():
        assert value == pytest.approx(theirs[2][name], rel=1e-4, abs=1e-6), name
    return ours[2]


SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08}


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "grpo"},
        {"loss_type": "bnpo", "entropy_coef": 0.1},
        {"loss_type": "dr_grpo", "delta": 1.4},
        {"loss_type": "dapo"},
        {"loss_type": "cispo", "epsilon_high": 1.3},
        {"loss_type": "sapo"},
        {"loss_type": "vespo"},
        {"loss_type": "luspo"},
        {"loss_type": "grpo", **SEQUENCE},
        {"loss_type": "dr_grpo", **SEQUENCE},
        {"loss_type": "dapo", "temperature": 0.7},
    ],
    ids=lambda x: " ".join(str(v) for v in x.values()),
)
def test_loss_gradients_and_metrics_equal(tmp_path, options):
    logged = check(tmp_path, **options)
    assert logged["entropy"] > 0
    if options["loss_type"] in ("bnpo", "dapo") or options == {"loss_type": "grpo"}:
        assert logged["clip_ratio/high_mean"] > 0
        assert logged["clip_ratio/low_mean"] > 0


@pytest.mark.parametrize("weighted", [False, True])
def test_kl_to_a_reference(tmp_path, weighted):
    """beta is set after the start: TRL would look for its reference in the hub."""
    options = {"loss_type": "dapo", "use_bias_correction_kl": weighted}
    # TRL logs the KL that it has weighted, we log the KL.
    logged = check(tmp_path, then={"beta": 0.3}, logged=not weighted, **options)
    assert logged["kl"] > 0


def test_on_policy(tmp_path):
    check(tmp_path, loss_type="grpo", without=("old_per_token_logps",))


def test_in_evaluation_nothing_is_accumulated(tmp_path):
    check(tmp_path, loss_type="dapo", evaluate=True)


@pytest.mark.parametrize(
    "network",
    [
        lambda: model(tie_word_embeddings=True),
        lambda: model("gemma2"),
        lambda: model("mixtral"),
    ],
    ids=["tied head", "softcap", "experts"],
)
def test_other_models(tmp_path, network):
    """A head that is the embedding; capped logits; a router with its own loss."""
    check(tmp_path, network, loss_type="dapo")


@pytest.mark.parametrize("loss_type", ["grpo", "sapo", "vespo"])
def test_a_correction_of_the_engine(tmp_path, loss_type):
    """The ratio that TRL computed, one of them 0; no engine is needed to use it."""
    check(
        tmp_path,
        loss_type=loss_type,
        then={"use_vllm": True, "vllm_importance_sampling_correction": True},
    )


def test_bfloat16_autocast(tmp_path):
    """Mixed precision: float32 weights, products of bfloat16; both round, but not alike."""
    theirs, ours = (
        result(kind, tmp_path, model(), loss_type="dapo", bf16=True)
        for kind in (trl.GRPOTrainer, GRPOTrainer)
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-2, atol=1e-3)
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() <= 2e-2 * gradient.norm(), name


def test_a_run_is_the_same_run(tmp_path):
    """Generation, rewards, two optimizer steps: the losses and the weights at the end."""
    weights, losses = [], []
    for kind in (trl.GRPOTrainer, GRPOTrainer):
        own = trainer(kind, tmp_path, model(), loss_type="dapo", max_steps=3, learning_rate=1e-3)
        own.train()
        losses.append([entry["loss"] for entry in own.state.log_history if "loss" in entry])
        weights.append(torch.cat([p.detach().flatten() for p in own.model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert any(abs(x) > 1e-3 for x in losses[0])
    start = torch.cat([p.detach().flatten() for p in model().parameters()])
    moved = (weights[0] - start).norm()
    assert (weights[0] - weights[1]).norm() <= 1e-2 * moved
    assert moved > 0


def test_under_ddp(tmp_path):
    """Two ranks over gloo; the head's gradient, made outside of DDP's forward, is averaged too."""
    script = Path(__file__).with_name("trl_ranks.py")
    run = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", *map(str, run)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_what_has_no_equal_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match="top_entropy_quantile"):
        trainer(GRPOTrainer, tmp_path, model(), top_entropy_quantile=0.5)
    scaled = model()
    scaled.config.logit_scale = 0.5
    with pytest.raises(ValueError, match="logit_scale"):
        trainer(GRPOTrainer, tmp_path, scaled)
