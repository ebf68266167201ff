"""One rank of test_trl_trainer.test_under_ddp: a run by each trainer, and the same run at that."""

import sys

import pytest
import torch
from test_trl_trainer import GRPOTrainer, model, trainer, trl

for tied in (False, True):
    weights, logged = [], []
    for kind in (trl.GRPOTrainer, GRPOTrainer):
        network = model(tie_word_embeddings=tied)
        own = trainer(kind, sys.argv[1], network, max_steps=3, learning_rate=1e-3)
        own.train()
        assert type(own.model_wrapped).__name__ == "DistributedDataParallel"
        steps = [entry for entry in own.state.log_history if "loss" in entry]
        names = ("loss", "grad_norm", "entropy")
        logged.append([step[name] for step in steps for name in names])
        weights.append(torch.cat([p.detach().flatten() for p in own.model.parameters()]))
    assert logged[0] == pytest.approx(logged[1], abs=1e-4)
    assert logged[0][0] != 0
    assert (weights[0] - weights[1]).norm() <= 1e-4 * weights[0].norm()
