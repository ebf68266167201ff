"""TRL's options as code, without TRL; tests/peers compares values with TRL's own losses."""

from __future__ import annotations

import math
import subprocess
import sys
import types

import pytest
import torch

from pyrlk import BNPO, CISPO, DAPO, GRPO, GSPO, LUSPO, SAPO, TIS, VESPO, DrGRPO
from pyrlk.integrations import trl_options as trl


def config(**options):
    """The defaults of GRPOConfig."""
    given = {
        "loss_type": "dapo",
        "importance_sampling_level": "token",
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "max_completion_length": 256,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "beta": 0.0,
        "temperature": 1.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "use_bias_correction_kl": True,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "steps_per_generation": 8,
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "sequence_mask",
        "vllm_importance_sampling_clip_min": None,
        "vllm_importance_sampling_clip_max": 3.0,
    }
    return types.SimpleNamespace(**given | options)


SEQUENCE = {"importance_sampling_level": "sequence"}


@pytest.mark.parametrize(
    ("options", "objective"),
    [
        ({}, DAPO(0.2, 0.2)),
        ({"loss_type": "grpo", "epsilon_high": 0.28, "delta": 1.5}, GRPO(0.2, 0.28, 1.5)),
        ({"loss_type": "bnpo"}, BNPO()),
        ({"loss_type": "dr_grpo"}, DrGRPO(256)),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, CISPO(eps_high=4.0)),
        ({"loss_type": "sapo"}, SAPO()),
        ({"loss_type": "vespo", **SEQUENCE}, VESPO()),
        ({"loss_type": "luspo"}, GRPO(aggregation="sequence-sum")),
        ({"loss_type": "luspo", **SEQUENCE}, LUSPO()),
        ({"loss_type": "grpo", **SEQUENCE}, GSPO(0.2, 0.2)),
        (
            {"loss_type": "grpo", "delta": 1.5, **SEQUENCE},
            LUSPO(0.2, 0.2, 1.5, aggregation="sequence"),
        ),
    ],
    ids=str,
)
def test_objective(options, objective):
    assert trl.objective_of(config(**options)) == objective


@pytest.mark.parametrize(
    ("function", "options", "name"),
    [
        (trl.objective_of, {"loss_type": "ppo"}, "loss_type"),
        (trl.objective_of, {"loss_type": "sapo", **SEQUENCE}, "importance_sampling_level"),
        (trl.objective_of, {"importance_sampling_level": "word"}, "importance_sampling_level"),
        (trl.objective_of, {"loss_type": "cispo"}, "epsilon_high"),
        (trl.options_of, {"top_entropy_quantile": 0.2}, "top_entropy_quantile"),
        (trl.options_of, {"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
        (trl.options_of, {"use_adaptive_entropy": True}, "use_adaptive_entropy"),
        (trl.options_of, {"entropy_coef": 0.1}, "entropy_coef"),
        (trl.options_of, {"beta": 0.1, **SEQUENCE}, "use_bias_correction_kl"),
        (
            trl.correction_of,
            {"vllm_importance_sampling_clip_min": 0.5},
            "vllm_importance_sampling_clip_min",
        ),
    ],
    ids=str,
)
def test_what_has_no_equal_is_refused_by_its_option(function, options, name):
    with pytest.raises(ValueError, match=name):
        function(config(**options))


def test_options():
    given = config(loss_type="bnpo", beta=0.1, entropy_coef=0.2, temperature=0.7)
    assert trl.options_of(given) == {
        "temperature": 0.7,
        "kl_coef": 0.1,
        "kl": "k3",
        "kl_importance": True,
        "entropy_coef": 0.2,
    }
    assert not trl.options_of(config())["kl_importance"]  # there is no KL to weigh


def test_correction():
    assert trl.correction_of(config()) == TIS("sequence", "mask", 3.0)
    truncate = config(
        vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=None
    )
    assert trl.correction_of(truncate) == TIS("token", "clip", math.inf)
    assert trl.correction_of(config(use_vllm=False)) is None


def test_denominators_of_an_evaluation():
    """Nothing is accumulated there: a mean over the batch, or over its tokens."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    given = {"accumulation_steps": 4, "num_items_in_batch": torch.tensor(12), "processes": 3}
    for kind, count in [("grpo", 2), ("bnpo", 4), ("dr_grpo", 2), ("dapo", 4)]:
        args = config(loss_type=kind)
        assert trl.normalizer_of(args, mask, **given, training=False) == count
    assert trl.normalizer_of(config(), mask, **given) == 12 / 3 * 4 / 8
    with pytest.raises(ValueError, match="num_items_in_batch"):
        trl.normalizer_of(config(), mask)


def test_without_trl_the_error_says_what_to_install():
    code = "import sys; sys.modules['trl'] = None; from pyrlk.integrations.trl import GRPOTrainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError: pyrlk.integrations.trl needs TRL: pip install trl" in done.stderr
