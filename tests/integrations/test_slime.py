"""slime's options as code; tests/peers/test_slime.py compares values with slime's formulas."""

from __future__ import annotations

import sys
import types
from unittest import mock

import pytest
import torch

from pyrlk import CISPO, GSPO, PPO
from pyrlk.integrations import slime


def arguments(**options):
    given = {
        "advantage_estimator": "grpo",
        "eps_clip": 0.2,
        "eps_clip_high": None,
        "eps_clip_c": None,
        "entropy_coef": 0.0,
        "use_kl_loss": False,
        "kl_loss_type": "k1",
        "rollout_temperature": 1.0,
    }
    return types.SimpleNamespace(**given | options)


@pytest.mark.parametrize(
    ("options", "objective"),
    [
        ({}, PPO(0.2, 0.2)),
        ({"eps_clip_high": 0.28, "eps_clip_c": 3.0}, PPO(0.2, 0.28, 3.0)),
        ({"advantage_estimator": "ppo"}, PPO(0.2, 0.2)),
        ({"advantage_estimator": "gspo"}, GSPO(0.2, 0.2, aggregation="token")),
        # slime's wide setting, which may lie below 0; its dual clip is not read here
        (
            {
                "advantage_estimator": "cispo",
                "eps_clip": 4.0,
                "eps_clip_high": 4.0,
                "eps_clip_c": 3.0,
            },
            CISPO(1.0, 4.0),
        ),
    ],
)
def test_objective(options, objective):
    assert slime.objective_of(arguments(**options)) == objective


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_opsm": True}, "--use-opsm"),
        ({"get_mismatch_metrics": True}, "--get-mismatch-metrics"),
        ({"custom_pg_loss_reducer_function_path": "a.b"}, "--custom-pg-loss-reducer-function-path"),
        ({"context_parallel_size": 2}, "--context-parallel-size"),
        ({"use_kl_loss": True, "kl_loss_type": "k9"}, "--kl-loss-type"),
    ],
)
def test_what_has_no_equal_is_refused_by_its_option(options, name):
    with pytest.raises(ValueError, match=name):
        slime.options_of(arguments(**options))


def test_a_dual_clip_of_the_sequence_ratio_is_refused():
    with pytest.raises(ValueError, match="--eps-clip-c"):
        slime.objective_of(arguments(advantage_estimator="gspo", eps_clip_c=3.0))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"custom_tis_function_path": "mine.weights"}, "--custom-tis-function-path"),
        ({"tis_clip_low": 0.5}, "--tis-clip-low"),  # without old log-probs to take it from
    ],
)
def test_corrections_that_are_not_slimes_own_are_refused(monkeypatch, options, name):
    core = types.ModuleType("megatron.core")
    core.mpu = types.SimpleNamespace(get_tensor_model_parallel_world_size=lambda: 1)
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", core)
    given = {
        "use_tis": True,
        "tis_clip": 2.0,
        "tis_clip_low": 0,
        "custom_tis_function_path": None,
        "use_rollout_logprobs": False,
        "recompute_loss_function": False,
    }
    batch = {
        "unconcat_tokens": [torch.tensor([1, 2, 3])],
        "total_lengths": [3],
        "response_lengths": [2],
        "advantages": [torch.ones(2)],
        "rollout_log_probs": [torch.zeros(2)],
    }
    with pytest.raises(ValueError, match=name):
        slime.policy_loss(arguments(**given | options), batch, torch.zeros(1, 3, 5), torch.sum)


def test_without_megatron_the_error_says_what_is_missing():
    with (
        mock.patch.dict(sys.modules, {"megatron": None}),
        pytest.raises(ImportError, match=r"slime.policy_loss needs slime's megatron.core"),
    ):
        slime.policy_loss(arguments(), {}, torch.zeros(1, 3, 5), torch.sum)
