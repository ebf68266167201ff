"""pyrlk inside a training framework: trl · verl · slime.

Each maps the framework's own options to an objective, a normalizer and a correction, and gives the
framework a loss of the signature that it asks for. Nothing is patched, and nothing else of pyrlk
imports these modules. A mapping imports without its framework; what needs it (`trl`,
`verl.register`, `slime.policy_loss`) raises an ImportError that says what to install.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

from torch import Tensor

from ..objective import TIS


def missing(name: str, install: str, error: ImportError) -> NoReturn:
    raise ImportError(f"{name} needs {install} ({error})") from error


def lower(eps: float) -> float:
    """eps_low of a ratio. That is never below 0: a bound under it is no bound, and neither is 0."""
    return min(eps, 1.0)


def weighted(old_logprobs: Tensor, weights: Tensor) -> dict[str, Any]:
    """The options of a loss by which each token's policy term is multiplied by its weight.

    A correction is exp(old − rollout), so rollout = old − log(weight). A weight may be 0.
    """
    rollout = old_logprobs - weights.log()
    return {"rollout_logprobs": rollout, "correction": TIS(max_ratio=math.inf)}
