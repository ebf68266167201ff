"""The batch side of DAPO (arXiv 2503.14476): group advantages, dynamic sampling, overlong shaping.

    advantage       A_i = (R_i − mean(R)) / (std(R) + eps),  over the G responses to one prompt
    informative     not all rewards of the group are equal: else every A_i is 0
    overlong        0 up to Lmax − Lcache tokens, then linear, −1 from Lmax on

Rewards are in the user's own unit; advantages have none with scale="std", that of the rewards with
scale="none".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import _check

_SCALES = ("std", "none")

Group = tuple[Any, Any, Any]  # (prompt, responses, rewards)


def group_advantages(
    rewards: Tensor,
    group_size: int | None = None,
    *,
    group_ids: Tensor | None = None,
    scale: str = "std",
    eps: float = 1e-6,
    leave_one_out: bool = False,
) -> Tensor:
    """Rewards relative to the other responses to the same prompt: (R − mean) / (std + eps).

    Parameters
    ----------
    rewards : [N] floating, integer or bool; any unit
    group_size : int, optional
        Responses 0 … G−1 are the first group, G … 2G−1 the second: N must be a multiple.
    group_ids : [N] integer, optional
        Instead of group_size: equal ids are one group, of any size and in any order.
    scale : {"std", "none"}
        "std" divides by std + eps, where std has ddof = 1 and is that of the whole group. "none"
        leaves the reward's unit (Dr. GRPO, RLOO), and eps is not used.
    eps : float ≥ 0
        In the unit of the rewards. It matters only where std is about as small.
    leave_one_out : bool
        The baseline is the mean of the *other* responses, R_i − (ΣR − R_i)/(G − 1), which is
        G/(G − 1) times the plain difference. `scale` then divides that as before.

    Returns
    -------
    [N] float32 (float64 for float64 rewards), in the order of `rewards`; computed in float64.
        A group of one, or of bitwise equal rewards, is exactly 0, also with eps = 0. Graded rewards
        are as good as 0/1.

    Raises
    ------
    TypeError, ValueError
        Naming the argument. A NaN or infinite reward is a ValueError with its index on CPU; on CUDA
        nothing synchronises and its group becomes NaN.
    """
    values = _rewards(rewards)
    _check.choice("scale", scale, _SCALES)
    eps = _check.number("eps", eps, 0.0)
    _check.flag("leave_one_out", leave_one_out)
    groups = _Groups.of(values, group_size, group_ids)
    size = groups.spread(groups.sum(torch.ones_like(values)))
    difference = values - groups.spread(groups.sum(values)) / size
    std = (groups.spread(groups.sum(difference * difference)) / (size - 1).clamp(min=1)).sqrt()
    if leave_one_out:
        difference = difference * size / (size - 1).clamp(min=1)
    if scale == "std":
        difference = difference / (std + eps)
    # The mean of equal numbers can round away from them: equality decides, not the difference.
    equal = groups.spread(groups.max(values) == groups.min(values))
    advantages = torch.where(equal, torch.zeros_like(values), difference)
    return advantages.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)


def informative_groups(
    rewards: Tensor, group_size: int | None = None, *, group_ids: Tensor | None = None
) -> Tensor:
    """Which groups can teach anything: not all rewards equal. For 0/1 rewards, 0 < ΣR < G.

    Parameters
    ----------
    rewards, group_size, group_ids
        As in `group_advantages`.

    Returns
    -------
    bool, one a group: in the order of the responses, or in ascending id with `group_ids`. A group
    of one is never informative. With group_ids the result's size depends on their values, so that
    form synchronises on CUDA.

    Raises
    ------
    TypeError, ValueError
        As in `group_advantages`.
    """
    values = _rewards(rewards)
    groups = _Groups.of(values, group_size, group_ids)
    informative = groups.max(values) != groups.min(values)
    return informative if group_ids is None else informative[: int(groups.count())]


def soft_overlong_penalty(lengths: Tensor, max_length: int, cache_length: int) -> Tensor:
    """DAPO's soft punishment of long responses (eq. 13), to be added to a reward of the order of 1.

        0                                            len ≤ max_length − cache_length
        ((max_length − cache_length) − len) / cache_length        up to max_length
        −1                                           len ≥ max_length

    Parameters
    ----------
    lengths : integer tensor of any shape
        Tokens of each response, its end token included. One that was cut off has max_length.
    max_length, cache_length : int, 0 < cache_length ≤ max_length
        In tokens. The first is where generation stops; the second how far before it the slope
        begins.

    Returns
    -------
    float32 in [−1, 0], the shape of `lengths`. Continuous: 0 at max_length − cache_length, −1 at
    max_length.

    Raises
    ------
    TypeError, ValueError
        Naming the argument. A negative length is a ValueError with its index on CPU.
    """
    lengths = _integers("lengths", lengths)
    _check.integer("max_length", max_length)
    _check.integer("cache_length", cache_length)
    if not 0 < cache_length <= max_length:
        raise ValueError(
            f"cache_length must lie in [1, max_length = {max_length}], got {cache_length}"
        )
    if _check.reads_values(lengths):
        _refuse_first("lengths", lengths, lengths < 0, "be ≥ 0")
    over = (max_length - cache_length) - lengths.to(torch.float64)
    return (over / cache_length).clamp(-1.0, 0.0).to(torch.float32)


class TooFewGroups(RuntimeError):
    """`DynamicSampler` ran out of rounds. `kept_share` is the share of informative groups."""

    def __init__(self, message: str, kept_share: float):
        super().__init__(message)
        self.kept_share = kept_share

    def __reduce__(self) -> tuple[Any, ...]:  # a rank may tell the others
        return type(self), (str(self), self.kept_share)


class DynamicSampler:
    """Batches of informative groups only: generate, drop the groups without signal, go on.

    Iterating yields lists of exactly `target_groups` groups. What a round brings beyond that is
    kept and opens the next batch (its behaviour log-probs are then those of the older policy). A
    round asks for as many groups as the batch still lacks, divided by the kept share of the
    previous batch and this one so far, and never for more than 4 · target_groups.

    Parameters
    ----------
    generate : callable
        generate(n) → iterable of (prompt, responses, rewards) groups, n of them or any other
        number; rewards are group_size numbers, as a sequence or a 1-d tensor. The rest is passed on
        unread.
    group_size : int ≥ 2
    target_groups : int ≥ 1
    max_rounds : int ≥ 1
        Calls of `generate` a batch.

    Attributes
    ----------
    surplus : list of groups
        Informative, not yet handed out.
    generated, kept : int
        Groups seen and informative groups among them, since the beginning.

    Raises
    ------
    TooFewGroups
        A RuntimeError with the kept share, from `next`, after `max_rounds`. What was found stays in
        `surplus`, so a further `next` goes on from there.
    TypeError, ValueError
        Naming the argument; NaN rewards, or a group whose rewards are not group_size numbers.
    """

    def __init__(
        self,
        generate: Callable[[int], Iterable[Group]],
        group_size: int,
        target_groups: int,
        *,
        max_rounds: int = 10,
    ):
        if not callable(generate):
            raise TypeError(f"generate must be callable, got {type(generate).__name__}")
        self._generate = generate
        self._group_size = _at_least("group_size", group_size, 2)
        self._target = _at_least("target_groups", target_groups, 1)
        self._max_rounds = _at_least("max_rounds", max_rounds, 1)
        self.surplus: list[Group] = []
        self.generated = 0
        self.kept = 0
        self._before = (0, 0)  # generated and kept when the previous batch began

    def __iter__(self) -> Iterator[list[Group]]:
        return self

    def __next__(self) -> list[Group]:
        begin = (self.generated, self.kept)
        for _ in range(self._max_rounds):
            if len(self.surplus) >= self._target:
                break
            self._round()
        self._before, previous = begin, self._before
        if len(self.surplus) < self._target:
            self._before = previous
            generated, kept = self.generated - begin[0], self.kept - begin[1]
            share = kept / generated if generated else 0.0
            raise TooFewGroups(
                f"max_rounds = {self._max_rounds} rounds brought {kept} informative groups out of "
                f"{generated} (kept share {share:.1%}); with the surplus that makes "
                f"{len(self.surplus)} of target_groups = {self._target}",
                share,
            )
        batch, self.surplus = self.surplus[: self._target], self.surplus[self._target :]
        return batch

    def _round(self) -> None:
        missing = self._target - len(self.surplus)
        generated, kept = self.generated - self._before[0], self.kept - self._before[1]
        wanted = math.ceil(missing * generated / kept) if kept else missing
        groups = self._generate(min(max(wanted, missing), 4 * self._target))
        try:
            found = iter(groups)
        except TypeError:
            kind = type(groups).__name__
            raise TypeError(f"generate must return an iterable of groups, got {kind}") from None
        for group in found:
            self.generated += 1
            if self._informative(group):
                self.kept += 1
                self.surplus.append(group)

    def _informative(self, group: Group) -> bool:
        if not isinstance(group, tuple) or len(group) != 3:
            size = f" of {len(group)}" if isinstance(group, tuple) else ""
            raise TypeError(
                "generate must yield (prompt, responses, rewards) tuples, got "
                f"{type(group).__name__}{size}"
            )
        try:
            rewards = [float(r) for r in group[2]]
        except (TypeError, ValueError) as error:
            raise TypeError(f"rewards of a group must be numbers: {error}") from None
        if len(rewards) != self._group_size:
            raise ValueError(
                f"rewards of a group must be group_size = {self._group_size} numbers, "
                f"got {len(rewards)}"
            )
        for i, reward in enumerate(rewards):
            if not math.isfinite(reward):
                raise ValueError(f"rewards must be finite, rewards[{i}] of a group is {reward}")
        return any(reward != rewards[0] for reward in rewards)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next batches depend on, besides `generate`."""
        return {
            "surplus": list(self.surplus),
            "generated": self.generated,
            "kept": self.kept,
            "before": tuple(self._before),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()`."""
        self.surplus = list(state["surplus"])
        self.generated, self.kept = int(state["generated"]), int(state["kept"])
        self._before = (int(state["before"][0]), int(state["before"][1]))


class _Groups:
    """Reductions over groups, and back to the responses. float64 inside."""

    def __init__(self, index: Tensor | None, group_size: int):
        self._index = index
        self._size = group_size

    @staticmethod
    def of(values: Tensor, group_size: int | None, group_ids: Tensor | None) -> _Groups:
        if (group_size is None) == (group_ids is None):
            given = "neither" if group_size is None else "both"
            raise ValueError(f"group_size or group_ids must be given, exactly one; got {given}")
        if group_size is not None:
            _at_least("group_size", group_size, 1)
            if values.numel() % group_size:
                raise ValueError(
                    f"group_size must divide the number of rewards, got {group_size} for "
                    f"{values.numel()} rewards"
                )
            return _Groups(None, group_size)
        ids = _integers("group_ids", group_ids)
        if ids.shape != values.shape or ids.device != values.device:
            raise ValueError(
                f"group_ids must have the shape and device of rewards, {tuple(values.shape)} on "
                f"{values.device}, got {tuple(ids.shape)} on {ids.device}"
            )
        # The rank of an id among the distinct ids, without a size that depends on values.
        ordered, order = torch.sort(ids, stable=True)
        new = torch.ones_like(ordered)
        new[1:] = (ordered[1:] != ordered[:-1]).to(new.dtype)
        rank = new.to(torch.int64).cumsum(0) - 1
        return _Groups(torch.empty_like(rank).scatter_(0, order, rank), 0)

    def count(self) -> Tensor | int:
        """How many groups there are, where ids make them."""
        assert self._index is not None
        return self._index.max() + 1 if self._index.numel() else 0

    def sum(self, x: Tensor) -> Tensor:
        if self._index is None:
            return x.view(-1, self._size).sum(-1)
        return torch.zeros_like(x).index_add_(0, self._index, x)

    def max(self, x: Tensor) -> Tensor:
        return self._extreme(x, "amax")

    def min(self, x: Tensor) -> Tensor:
        return self._extreme(x, "amin")

    def _extreme(self, x: Tensor, which: str) -> Tensor:
        if self._index is None:
            x = x.view(-1, self._size)
            return x.amax(-1) if which == "amax" else x.amin(-1)
        out = torch.zeros_like(x)
        return out.scatter_reduce_(0, self._index, x, which, include_self=False)

    def spread(self, x: Tensor) -> Tensor:
        if self._index is None:
            return x.repeat_interleave(self._size)
        return x[self._index]


def _rewards(rewards: Tensor) -> Tensor:
    rewards = _check.tensor("rewards", rewards)
    if rewards.is_complex():
        raise TypeError(f"rewards must be real, got {str(rewards.dtype).removeprefix('torch.')}")
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape [N], got {tuple(rewards.shape)}")
    if _check.reads_values(rewards):
        _refuse_first("rewards", rewards, ~torch.isfinite(rewards), "be finite")
    return rewards.detach().to(torch.float64).contiguous()


def _integers(name: str, x) -> Tensor:
    x = _check.tensor(name, x)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {str(x.dtype)[6:]}")
    return x


def _refuse_first(name: str, x: Tensor, bad: Tensor, wanted: str) -> None:
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        value = x[tuple(at)].item()
        raise ValueError(f"{name} must {wanted}, {name}[{', '.join(map(str, at))}] is {value}")


def _at_least(name: str, x, low: int) -> int:
    if _check.integer(name, x) < low:
        raise ValueError(f"{name} must be ≥ {low}, got {x}")
    return x
