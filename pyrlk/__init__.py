"""pyrlk: the kernels of one RL step on a language model — sample, score, learn, sync.

The names below load on first use, so that `import pyrlk` costs nothing in an inference engine.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "sample": "sampling",
    "replay": "sampling",
    "Sample": "sampling",
    "Support": "support",
    "verify_draft": "speculative",
    "Verified": "speculative",
    "token_logprobs": "logprob",
    "linear_token_logprobs": "linear",
    "dapo_loss": "loss",
    "reinforce_loss": "loss",
    "policy_loss": "loss",
    "linear_policy_loss": "linear",
    "policy_loss_from_logprobs": "from_logprobs",
    "reinforce_grad": "reinforce",
    "normalizer": "loss",
    "mtp_loss": "mtp",
    "MTPStats": "mtp",
    "PolicyStats": "_plan",
    "REINFORCE": "objective",
    "PPO": "objective",
    "GRPO": "objective",
    "BNPO": "objective",
    "DrGRPO": "objective",
    "DAPO": "objective",
    "GSPO": "objective",
    "CISPO": "objective",
    "SAPO": "objective",
    "GMPO": "objective",
    "LUSPO": "objective",
    "VESPO": "objective",
    "DPPO": "objective",
    "DRO": "objective",
    "ClipCov": "objective",
    "KLCov": "objective",
    "TIS": "objective",
    "group_advantages": "batch",
    "informative_groups": "batch",
    "soft_overlong_penalty": "batch",
    "DynamicSampler": "batch",
    "empty_cache": "_warm",
}
_MODULES = ("reference", "weights")

__all__ = [*_HOME, *_MODULES]

if TYPE_CHECKING:
    from . import reference as reference
    from . import weights as weights
    from ._plan import PolicyStats as PolicyStats
    from ._warm import empty_cache as empty_cache
    from .batch import DynamicSampler as DynamicSampler
    from .batch import group_advantages as group_advantages
    from .batch import informative_groups as informative_groups
    from .batch import soft_overlong_penalty as soft_overlong_penalty
    from .from_logprobs import policy_loss_from_logprobs as policy_loss_from_logprobs
    from .linear import linear_policy_loss as linear_policy_loss
    from .linear import linear_token_logprobs as linear_token_logprobs
    from .logprob import token_logprobs as token_logprobs
    from .loss import dapo_loss as dapo_loss
    from .loss import normalizer as normalizer
    from .loss import policy_loss as policy_loss
    from .loss import reinforce_loss as reinforce_loss
    from .mtp import MTPStats as MTPStats
    from .mtp import mtp_loss as mtp_loss
    from .objective import BNPO as BNPO
    from .objective import CISPO as CISPO
    from .objective import DAPO as DAPO
    from .objective import DPPO as DPPO
    from .objective import DRO as DRO
    from .objective import GMPO as GMPO
    from .objective import GRPO as GRPO
    from .objective import GSPO as GSPO
    from .objective import LUSPO as LUSPO
    from .objective import PPO as PPO
    from .objective import REINFORCE as REINFORCE
    from .objective import SAPO as SAPO
    from .objective import TIS as TIS
    from .objective import VESPO as VESPO
    from .objective import ClipCov as ClipCov
    from .objective import DrGRPO as DrGRPO
    from .objective import KLCov as KLCov
    from .reinforce import reinforce_grad as reinforce_grad
    from .sampling import Sample as Sample
    from .sampling import replay as replay
    from .sampling import sample as sample
    from .speculative import Verified as Verified
    from .speculative import verify_draft as verify_draft
    from .support import Support as Support


def __getattr__(name: str):
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'pyrlk' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
