"""TRL 1.16: its GRPOTrainer, with a loss that pyrlk computes.

    from pyrlk.integrations.trl import GRPOTrainer        in place of `from trl import GRPOTrainer`

    backbone(input) = hidden [B, L, H],   head = W [V, H]   →   linear_policy_loss(hidden, W, …)

Everything else is TRL's: generation, rewards, advantages, old and reference log-probs, the step.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..linear import linear_policy_loss
from . import missing, weighted
from .trl_options import correction_of, normalizer_of, objective_of, options_of

try:
    import trl
except ImportError as error:
    missing("pyrlk.integrations.trl", "TRL: pip install trl==1.16.0", error)

__all__ = ["GRPOTrainer", "correction_of", "normalizer_of", "objective_of", "options_of"]

# Scales of the logits by which a model's configuration changes what its head says.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class GRPOTrainer(trl.GRPOTrainer):
    """trl.GRPOTrainer, its loss computed by pyrlk from hidden states and the head's weight.

    The arguments are TRL's. Logged are TRL's kl, entropy and, where a token's ratio is clipped
    (grpo, bnpo, dr_grpo, dapo and luspo at token level), clip_ratio/low_mean, high_mean and
    region_mean; kl without the weight of use_bias_correction_kl.

    Raises
    ------
    ValueError
        Naming the option, or the kind of model, that has no equal here: see `objective_of` and
        `options_of`; images; a head that is no plain torch.nn.Linear or is sharded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        objective_of(self.args)
        options_of(self.args)
        self._head()  # refuses now, not in the middle of a run

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if inputs.get("pixel_values") is not None:
            raise ValueError("images have no equal in pyrlk.integrations.trl.GRPOTrainer")
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        training = self.model.training
        hidden, weight, bias, aux_loss = self._score(model, inputs)
        old, objective = inputs.get("old_per_token_logps"), objective_of(self.args)
        correction = {}
        if self.use_vllm and self.vllm_importance_sampling_correction:
            correction = weighted(
                inputs["old_per_token_logps"], inputs["importance_sampling_ratio"]
            )
        steps = self.current_gradient_accumulation_steps
        loss, stats = linear_policy_loss(
            hidden,
            weight,
            inputs["completion_ids"],
            old,
            inputs["advantages"],
            mask,
            objective=objective,
            bias=bias,
            softcap=getattr(self._text_config(), "final_logit_softcapping", None),
            logits_dtype=None if hidden.dtype == torch.float64 else torch.float32,
            ref_logprobs=inputs["ref_per_token_logps"] if self.beta != 0 else None,
            normalizer=normalizer_of(
                self.args,
                mask,
                accumulation_steps=steps,
                num_items_in_batch=inputs.get("num_items_in_batch"),
                processes=self.accelerator.num_processes,
                training=training,
            ),
            return_stats=True,
            **correction,
            **options_of(self.args),
        )
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss / (steps if training else 1)
        self._log_stats("train" if training else "eval", objective, stats, aux_loss)
        return loss

    def _score(self, model: Any, inputs: dict[str, Any]) -> tuple:
        """(hidden [B, L, H], weight [V, H], bias, aux_loss): what predicts each token."""
        length, seen = inputs["completion_ids"].shape[1], []
        names = ("token_type_ids", "mm_token_type_ids")
        given = {name: inputs[name] for name in names if inputs.get(name) is not None}
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        # The hook reads the backbone's output on the way to the head, so that DDP's and PEFT's own
        # forward are what runs. One row of logits is computed beside it, and no one reads it.
        hook = self._core().base_model.register_forward_hook(
            lambda module, args, output: seen.append(output.last_hidden_state)
        )
        with contextlib.ExitStack() as stack:
            stack.callback(hook.remove)
            stack.enter_context(self.accelerator.autocast())
            outputs = model(
                input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                logits_to_keep=1,
                use_cache=False,
                **given,
            )
            hidden, head = seen[0][:, -length - 1 : -1], self._head()
            kind = hidden.device.type
            dtype = head.weight.dtype
            if torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
        if self.args.cast_lm_head_to_fp32:
            dtype = torch.float32
        bias = None if head.bias is None else head.bias.to(dtype)
        aux_loss = outputs.aux_loss if self.aux_loss_enabled else None
        return hidden.to(dtype), head.weight.to(dtype), bias, aux_loss

    def _core(self) -> Any:
        """The language model under the wrappers of Accelerate and PEFT."""
        core = self.accelerator.unwrap_model(self.model)
        return core.get_base_model() if hasattr(core, "get_base_model") else core

    def _text_config(self) -> Any:
        return self._core().config.get_text_config()

    def _head(self) -> torch.nn.Linear:
        head, config = self._core().get_output_embeddings(), self._text_config()
        if not isinstance(head, torch.nn.Linear):
            raise ValueError(
                f"the model's head must be a torch.nn.Linear, got {type(head).__name__}"
            )
        weight = head.weight
        if weight.dim() != 2 or isinstance(weight, DTensor):
            raise ValueError("the model's head must be whole on every process, and it is sharded")
        for name in _SCALES:
            if getattr(config, name, None) not in (None, 1):
                raise ValueError(f"the model's {name} has no equal in pyrlk.linear_policy_loss")
        return head

    def _log_stats(self, mode: str, objective: Any, stats: Any, aux_loss: Tensor | None) -> None:
        values = {"entropy": stats.entropy}
        if self.beta != 0:
            values["kl"] = stats.ref_kl
        if objective.fused:
            values["clip_ratio/low_mean"] = stats.clip_low
            values["clip_ratio/high_mean"] = stats.clip_high
            values["clip_ratio/region_mean"] = stats.clip_low + stats.clip_high
        count = stats.tokens
        sums = torch.stack([*(x * count for x in values.values()), count])
        *totals, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, total in zip(values, totals, strict=True):
            self._metrics[mode][name].append(total / max(tokens, 1))
        if aux_loss is not None:
            mean = self.accelerator.gather_for_metrics(aux_loss.detach()).mean().item()
            self._metrics[mode]["aux_loss"].append(mean)
