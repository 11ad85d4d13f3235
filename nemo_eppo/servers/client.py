"""Clients of the critic and reward servers. Every call returns a future, so requests overlap with other work."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch

from nemo_eppo.servers.endpoints import ENDPOINTS
from nemo_eppo.servers.server_client import ServerClient, ServerUnavailable
from nemo_eppo.servers.transport import ServerError
from nemo_eppo.settings.servers import ClientConfig

# The largest absolute value in an answer: larger ones overflow fp32 when they are standardised, squared or summed.
LARGEST = 1e15

__all__ = ["CriticClient", "RewardClient", "Rewards", "ServerClient", "ServerUnavailable"]


class CriticClient(ServerClient):
    """The critic server. Shapes: tokens int [B, S], lengths int [B], all others [B, T = S - 1]."""

    endpoints = ENDPOINTS

    def __init__(self, config: ClientConfig) -> None:
        super().__init__("critic", config)

    def infer(self, tokens: torch.Tensor, lengths: torch.Tensor) -> "Future[torch.Tensor]":
        """Return the values, fp32 [B, T], under the weights at that moment: pending updates are not waited for."""

        def check(outputs: dict[str, Any]) -> torch.Tensor:
            values = torch.from_numpy(outputs["values"])
            real = torch.arange(values.shape[1]) < lengths.cpu()[:, None]  # values may include the last token's
            _refuse_unusable(self, "values", values, real)
            return values

        return self.call("critic_infer", check, tokens=tokens, lengths=lengths)

    def train(
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        returns: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        step: int,
    ) -> "Future[dict[str, float]]":
        """Make update number `step` (from 1) of the critic with this mini-batch; the future gives the update's metrics.

        Args:
            values: values at the time of the rollout, which clipping refers to.
            mask: bool, True where action t produced a response token.
        """

        def check(outputs: dict[str, Any]) -> dict[str, float]:
            metrics: dict[str, Any] = outputs["metrics"]
            for key, value in metrics.items():
                if type(value) not in (int, float) or not math.isfinite(value):
                    raise _wrong_answer(self, f"metrics[{key!r}]", value, "a finite number")
            return metrics

        return self.call(
            "critic_train",
            check,
            tokens=tokens,
            lengths=lengths,
            returns=returns,
            values=values,
            mask=mask,
            step=torch.tensor([step]),
        )

    def begin(self, run: int, step: int, fresh: bool = False) -> "Future[int]":
        """Begin or resume the run with id `run` after update `step`; a critic that has made more goes back to it.

        Args:
            fresh: whether a critic of another run sets that run's checkpoints aside and begins anew.
        """

        def check(outputs: dict[str, Any]) -> int:
            if outputs["step"] != step:
                raise _wrong_answer(self, "step", outputs["step"], f"{step}, which critic_begin asked for")
            return step

        numbers = {"run": torch.tensor([run]), "fresh": torch.tensor([fresh]), "step": torch.tensor([step])}
        return self.call("critic_begin", check, **numbers)

    def save(self, step: int, keep: Sequence[int]) -> "Future[str]":
        """Start to save the critic, whose last update must be `step`; the future gives the path on the server.

        Args:
            keep: updates whose checkpoints are still needed; all others are removed.
        """
        kept = torch.tensor([0, *keep])
        return self.call("critic_save", itemgetter("path"), keep=kept, step=torch.tensor([step]))

    def saved(self, step: int) -> "Future[str]":
        """Wait for the checkpoint that `save` started; the future gives its path on the server."""
        return self.call("critic_saved", itemgetter("path"), step=torch.tensor([step]))


class Rewards(NamedTuple):
    """Rewards and latents of B responses."""

    rewards: torch.Tensor
    """fp32 [B, K] raw scores, one column per reward model."""
    latents: torch.Tensor
    """fp32 [B, D] latents of the last token; D = 0 if the models have none."""


class RewardClient(ServerClient):
    """A reward server, or the reward models of a critic server (`name="critic"`)."""

    endpoints = ENDPOINTS

    def __init__(self, config: ClientConfig, name: str = "reward", others: Sequence[str] = ()) -> None:
        super().__init__(name, config, others)

    def connect(self, expect: Mapping[str, Any]) -> dict[str, Any]:
        """See `ServerClient.connect`. Also raises ServerError if the description of the reward models is not one."""
        status = super().connect(expect)
        model = status.get("reward")
        try:
            count, latents = model["k"], model["latent_size"]  # type: ignore[index]
            numbers = [*model["mean"], *model["std"]]  # type: ignore[index]
            fits = count >= 1 and latents >= 0 and len(model["mean"]) == len(model["std"]) == count  # type: ignore[index]
            fits = fits and all(map(math.isfinite, numbers)) and min(model["std"]) > 0  # type: ignore[index]
        except (TypeError, KeyError):
            fits = False
        if not fits:
            expected = "k, latent_size, and k finite numbers as mean and as std, these above 0"
            raise _wrong_answer(self, "status.reward", model, expected)
        self._sizes = {"K": count, "D": latents}
        return status

    def infer(self, tokens: torch.Tensor, prompt_lengths: torch.Tensor, lengths: torch.Tensor) -> "Future[Rewards]":
        """Return the rewards of responses: tokens int [B, S], prompt_lengths, lengths (prompt and response) int [B]."""

        def check(outputs: dict[str, Any]) -> Rewards:
            rewards = torch.from_numpy(outputs["rewards"])
            latents = torch.from_numpy(outputs.get("latents", np.zeros((len(rewards), 0), np.float32)))
            if latents.shape[1] != self._sizes["D"]:
                raise _wrong_answer(self, "latents", "none", f"{self._sizes['D']} numbers a response")
            _refuse_unusable(self, "rewards", rewards)
            _refuse_unusable(self, "latents", latents)
            return Rewards(rewards, latents)

        return self.call("reward_infer", check, tokens=tokens, prompt_lengths=prompt_lengths, lengths=lengths)


def _refuse_unusable(client: ServerClient, name: str, values: torch.Tensor, where: torch.Tensor | bool = True) -> None:
    """Raise ServerError for a number that is not finite or exceeds LARGEST, at places where `where` is true."""
    wrong = ~(values.abs() <= LARGEST) & where
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise _wrong_answer(
            client, f"{name}[{row}, {column}]", f"{values[row, column].item():g}", f"a number within {LARGEST:g}"
        )


def _wrong_answer(client: ServerClient, field: str, value: object, expected: str) -> ServerError:
    message = f"{client.name} server at {client.config.url} answered {field} = {value}, expected {expected}"
    return ServerError(message, field, str(value), expected)
