"""verl's options as code, where there is no formula to compare with: those are in tests/peers."""

from __future__ import annotations

import sys
import types
from unittest import mock

import pytest
import torch

from pyrlk import CISPO, DPPO, PPO
from pyrlk.integrations import verl


def config(**options):
    given = {
        "clip_ratio": 0.2,
        "clip_ratio_low": None,
        "clip_ratio_high": None,
        "clip_ratio_c": 3.0,
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "loss_agg_mode": "token-mean",
        "policy_loss": types.SimpleNamespace(loss_mode="vanilla", dro_beta=None),
        "global_batch_info": {},
    }
    return types.SimpleNamespace(**given | options)


def mode(name):
    return config(policy_loss=types.SimpleNamespace(loss_mode=name, dro_beta=None))


def test_mode_and_aggregation_come_from_the_config():
    assert verl.objective_of(config()) == PPO(0.2, 0.2, 3.0)
    assert verl.objective_of(mode("pyrlk_cispo")) == CISPO(0.2, 0.2)
    given = config(clip_ratio_high=0.28, loss_agg_mode="seq-mean-token-mean")
    assert verl.objective_of(given) == PPO(0.2, 0.28, 3.0, aggregation="sequence")
    assert verl.objective_of(given, "dppo_kl", "token-mean") == DPPO("kl", 0.2, 0.28, 3.0)


def test_a_lower_bound_below_zero_is_no_bound():
    """verl's recipes for cispo set clip_ratio_low to 10; a ratio never falls below 0."""
    assert verl.objective_of(config(clip_ratio_low=10.0), "cispo") == CISPO(1.0, 0.2)


def refused(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value


def test_what_has_no_equal_is_refused_by_its_option():
    refused(lambda: verl.objective_of(mode("bypass_mode")), "policy_loss.loss_mode", "bypass_mode")
    refused(lambda: verl.objective_of(mode("dro")), "policy_loss.dro_beta")
    refused(lambda: verl.objective_of(config(), "vanilla", "seq"), "loss_agg_mode", "'seq'")


@pytest.mark.parametrize(
    ("agg", "name"),
    [
        ("token-mean", "batch_num_tokens"),
        ("seq-mean-token-mean", "global_batch_size"),
        ("seq-mean-token-sum-norm", "global_batch_size"),
    ],
)
def test_several_ranks_need_the_global_count(agg, name):
    given = config(global_batch_info={"dp_size": 2})
    refused(lambda: verl.normalizer_of(given, "vanilla", agg, torch.ones(2, 3)), name, "2 ranks")


def test_clip_cov_chooses_anew_and_by_torchs_seed():
    """Two calls drop other tokens; the same global seed the same ones."""
    own = types.SimpleNamespace(clip_cov_ratio=0.3, clip_cov_lb=-9.0, clip_cov_ub=9.0)
    given = config(policy_loss=own)
    torch.manual_seed(3)
    x = torch.randn(6, 20)
    mask, advantages = torch.ones(6, 20, dtype=torch.bool), torch.randn(6, 20)

    def dropped(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        leaf = x.clone().requires_grad_()
        loss, _ = verl.policy_loss("clip_cov", x, leaf, advantages, mask, config=given)
        return torch.autograd.grad(loss, leaf)[0] == 0

    first, second = dropped(1), dropped()
    assert first.sum() == second.sum() == int(0.3 * 120)
    assert not torch.equal(first, second)
    assert torch.equal(first, dropped(1))


def test_masked_places_may_hold_anything_in_the_metrics_too():
    x, mask = torch.zeros(2, 3), torch.tensor([[True, True, False], [True, False, False]])
    old = torch.where(mask, -0.5, torch.nan)
    loss, metrics = verl.policy_loss("vanilla", old, x, torch.ones(2, 3), mask, config=config())
    assert loss.isfinite()
    assert metrics["actor/ppo_kl"] == pytest.approx(-0.5)
    assert metrics["actor/pg_clipfrac"] == 1.0  # e^0.5 is beyond 1.2
    assert metrics["actor/ratio_max"] == pytest.approx(1.6487, rel=1e-4)


def test_registering_without_verl_says_what_to_install():
    with (
        mock.patch.dict(sys.modules, {"verl": None}),
        pytest.raises(ImportError, match="pip install verl"),
    ):
        verl.register()
