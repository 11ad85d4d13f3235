"""Advantage estimators: how much better than expected each token of a response was, all behind one contract.

    estimator(rewards, values, mask, groups, truncated) -> (advantages, returns)

Takes:
    rewards: [B, T] shaped reward of every action, a KL penalty per token included.
    values: depends on the estimator's `needs`.
        "critic": [B, T] the critic's value of the state in which action `t` is taken; or [B, T + 1], whose column
        `last + 1` is the value after a row's last action.
        "greedy": [B, T] at every action the total reward of the greedy response to the same prompt.
        "group" (which wants several responses to each prompt), "nothing": not read, may be None.
    mask: bool [B, T] with one unbroken run of response tokens in each row, anywhere.
    groups: int64 [B] id of the prompt of each response; ids, their order and the sizes of groups are free.
    truncated: bool [B] True for a response that was cut off.

Gives:
    advantages: [B, T] in fp32 (fp64 stays fp64), zero outside the mask.
    returns: [B, T] the values that the critic is trained towards, zero outside the mask; None without a critic.

B is the *global* batch, because whitening and groups look across rows. What stands outside the mask changes no bit; the
order of rows and the amount of padding change at most the last digits of sums. A row without a response token, or with
a gap between two, is a ValueError.

To add an estimator, write its class here, a frozen dataclass whose fields are its settings, and enter it in ESTIMATORS
and in `choices.py`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from nemo_eppo.algorithms.choices import ESTIMATOR_NEEDS, EstimatorName, Needs
from nemo_eppo.algorithms.masking import last_action, whiten, zero_outside


class AdvantageEstimator(Protocol):
    """The contract at the top of this file, for type checkers."""

    needs: ClassVar[Needs]

    def __init__(self, **settings: Any) -> None: ...

    def __call__(
        self, rewards: Tensor, values: Tensor | None, mask: Tensor, groups: Tensor, truncated: Tensor
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438).

    `A_t = delta_t + gamma*lam*A_{t+1}` with `delta_t = r_t + gamma*V_{t+1} - V_t`; the returns are `A_t + V_t`, before
    whitening. The value after the last action is 0, because the episode is over.
    """

    needs: ClassVar[Needs] = ESTIMATOR_NEEDS["gae"]
    gamma: float = 1.0
    """Discount for each token, from 0 to 1."""
    lam: float = 0.95
    """Weight of later deltas, from 0 (rely on the critic) to 1 (rely on the rewards)."""
    whiten: bool = True
    """Whether advantages are scaled to mean zero and unit variance over all response tokens of the batch."""
    bootstrap_truncated: bool = False
    """Whether the value after a truncated response's last action is the critic's, not 0; needs values [B, T + 1]."""

    def __call__(
        self, rewards: Tensor, values: Tensor | None, mask: Tensor, groups: Tensor, truncated: Tensor
    ) -> tuple[Tensor, Tensor]:
        actions = mask.shape[1]
        if values is None or values.shape[1] not in {actions + 1, actions + self.bootstrap_truncated}:
            expected = "[B, T + 1], for bootstrap_truncated," if self.bootstrap_truncated else "[B, T] or [B, T + 1]"
            given = None if values is None else list(values.shape)
            raise ValueError(f"values: {given}; expected the critic's {expected} beside a mask {list(mask.shape)}")
        rewards, current = zero_outside(rewards, mask), zero_outside(values[:, :actions], mask)
        following = torch.cat([current[:, 1:], torch.zeros_like(current[:, :1])], dim=1)
        if self.bootstrap_truncated:
            last = last_action(mask)[:, None]
            after_last = torch.where(truncated[:, None], values.gather(1, last + 1).to(current), 0.0)
            following = following.scatter(1, last, after_last)
        deltas = rewards + self.gamma * following - current
        advantages = _to_go(deltas, mask, self.gamma * self.lam)
        returns = zero_outside(advantages + current, mask)
        return whiten(advantages, mask) if self.whiten else advantages, returns


@dataclass(frozen=True)
class GRPO:
    """Group-relative advantages `(R - mean) / (std + 1e-6)` on every token (Shao et al. 2024, arXiv 2402.03300).

    `R` is the total reward of a response, mean and std are taken over its group. The paper does not say which std; this
    is the sample's (divided by n - 1), as in verl and TRL. A group of one response is a ValueError.
    """

    needs: ClassVar[Needs] = ESTIMATOR_NEEDS["grpo"]
    normalize_std: bool = True
    """Whether to divide by the group's std; if not, this is Dr. GRPO (Liu et al. 2025, arXiv 2503.20783)."""

    def __call__(
        self, rewards: Tensor, values: Tensor | None, mask: Tensor, groups: Tensor, truncated: Tensor
    ) -> tuple[Tensor, None]:
        relative, index, sizes = _relative_to_group(rewards, mask, groups)
        if self.normalize_std:
            variance = _group_sum(relative.square(), index) / (sizes - 1)
            relative = relative / (variance.sqrt() + 1e-6)
        return _on_every_token(relative, rewards, mask), None


@dataclass(frozen=True)
class RLOO:
    """REINFORCE leave-one-out: on every token `R` less the mean `R` of the rest of its group (arXiv 2402.14740).

    `R` is the total reward of a response. In a group of n this is `n / (n - 1)` times `R` less the mean of all.
    A group of one response is a ValueError.
    """

    needs: ClassVar[Needs] = ESTIMATOR_NEEDS["rloo"]

    def __call__(
        self, rewards: Tensor, values: Tensor | None, mask: Tensor, groups: Tensor, truncated: Tensor
    ) -> tuple[Tensor, None]:
        relative, _, sizes = _relative_to_group(rewards, mask, groups)
        return _on_every_token(relative * sizes / (sizes - 1), rewards, mask), None


@dataclass(frozen=True)
class ReinforcePlusPlus:
    """REINFORCE++: rewards to go, whitened over all response tokens of the batch (arXiv 2501.03262)."""

    needs: ClassVar[Needs] = ESTIMATOR_NEEDS["reinforce_plus_plus"]
    gamma: float = 1.0
    """Discount for each token, from 0 to 1."""

    def __call__(
        self, rewards: Tensor, values: Tensor | None, mask: Tensor, groups: Tensor, truncated: Tensor
    ) -> tuple[Tensor, None]:
        return whiten(_to_go(rewards, mask, self.gamma), mask), None


@dataclass(frozen=True)
class ReMax:
    """Rewards to go less the total reward of the greedy response to the same prompt (Li et al., arXiv 2310.10505)."""

    needs: ClassVar[Needs] = ESTIMATOR_NEEDS["remax"]

    def __call__(
        self, rewards: Tensor, values: Tensor | None, mask: Tensor, groups: Tensor, truncated: Tensor
    ) -> tuple[Tensor, None]:
        if values is None:
            raise ValueError(f"values: None; expected {list(mask.shape)} rewards of greedy responses")
        return _to_go(rewards, mask, 1.0) - zero_outside(values, mask), None


def _to_go(x: Tensor, mask: Tensor, decay: float) -> Tensor:
    """Return the sum over i of `decay^i * x_{t+i}` to the end of the response: [B, T], zero outside the mask.

    Each pass doubles the number of terms summed, so log2(T) passes over the batch replace a loop over T. The sums
    that appear before a response are zeroed at the end.
    """
    _check_runs(mask)
    total, reach = zero_outside(x, mask), 1
    while reach < total.shape[1]:
        total = torch.cat([total[:, :-reach] + decay * total[:, reach:], total[:, -reach:]], dim=1)
        reach, decay = 2 * reach, decay * decay
    return zero_outside(total, mask)


def _relative_to_group(rewards: Tensor, mask: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each response [B] its total reward less its group's mean (fp64), and its group's index and size."""
    _check_runs(mask)
    if groups.shape != mask.shape[:1]:
        raise ValueError(f"groups: {list(groups.shape)}; expected one id for each of {len(mask)} responses")
    ids, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    if bool((counts < 2).any()):
        raise ValueError(
            f"groups: group {int(ids[counts < 2][0])} has 1 response; expected at least 2, to compare with each other"
        )
    # in fp64 the mean of equal rewards differs from them by so little that dividing by 1e-6 leaves it near zero
    total, sizes = zero_outside(rewards, mask).sum(dim=1, dtype=torch.float64), counts[index]
    return total - _group_sum(total, index) / sizes, index, sizes


def _group_sum(x: Tensor, index: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(0, index, x)[index]


def _on_every_token(x: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x[:, None], 0.0).to(torch.promote_types(rewards.dtype, torch.float32))


def _check_runs(mask: Tensor) -> None:
    if bool((last_action(mask) - mask.int().argmax(dim=1) + 1 != mask.sum(dim=1)).any()):
        raise ValueError("mask: expected one unbroken run of response tokens in each row")


ESTIMATORS: dict[EstimatorName, type[AdvantageEstimator]] = {
    "gae": GAE,
    "grpo": GRPO,
    "rloo": RLOO,
    "reinforce_plus_plus": ReinforcePlusPlus,
    "remax": ReMax,
}
