"""The policy: a small causal LM built here, or any transformers folder, with its codec.

Both processes call `build` and have the same module; the engine's weights come from the trainer.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn


class CharCodec:
    """One token a character."""

    CHARACTERS = "0123456789+= "

    def __init__(self) -> None:
        self.end = len(self.CHARACTERS)
        self.pad = self.end + 1
        self.size = 16

    def prompt(self, text: str) -> list[int]:
        return [self.CHARACTERS.index(c) for c in text]

    response = prompt

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.CHARACTERS[t] for t in tokens if t < self.end)


class TextCodec:
    """The tokenizer of a transformers folder."""

    def __init__(self, path: str):
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        self.end = self._tokenizer.eos_token_id
        if self.end is None:
            raise ValueError(f"--model {path}: its tokenizer has no end-of-sequence token")
        pad = self._tokenizer.pad_token_id
        self.pad = self.end if pad is None else pad

    def prompt(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def response(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


Codec = CharCodec | TextCodec


def build(path: str | None, seed: int, device: str) -> tuple[nn.Module, Codec]:
    """The module in float32 and eval mode (without dropout both processes agree), and its codec."""
    codec: Codec
    model: Any
    if path is None:
        codec = CharCodec()
        config = transformers.Qwen3Config(
            vocab_size=codec.size,
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=64,
            initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=codec.end,
            pad_token_id=codec.pad,
        )
        torch.manual_seed(seed)
        model = transformers.Qwen3ForCausalLM(config)
    else:
        codec = TextCodec(path)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to(device).eval(), codec


def pad_left(rows: list[list[int]], pad: int, device: str) -> tuple[Tensor, Tensor | None]:
    """ids [N, P] and attention mask [N, P], or None where nothing had to be padded."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    if all(len(row) == width for row in rows):
        return ids, None
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def response_logits(
    model: nn.Module, prompt: Tensor, prompt_mask: Tensor | None, tokens: Tensor, pad: int
) -> Tensor:
    """logits [N, L, V] that predict `tokens` [N, L] after the left-padded prompts.

    Tokens of −100 lie beyond the end of a response.
    """
    shown = torch.where(tokens == -100, pad, tokens)[:, :-1]
    positions: dict[str, Tensor] = {}
    if prompt_mask is not None:
        mask = torch.cat([prompt_mask, torch.ones_like(shown)], 1)
        positions = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    inputs = torch.cat([prompt, shown], 1)
    length = tokens.shape[1]
    return model(input_ids=inputs, use_cache=False, logits_to_keep=length, **positions).logits
