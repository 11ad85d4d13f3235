"""A critic and reward models in the actor's own processes: no server, no second job, the same numbers.

A request is encoded, validated, cast and checked against the step rules (`servers/steps.py`) exactly as on its way
through a server, and then given to the same endpoint functions on the actor's ranks. The results therefore equal those
of a server in the actor's layout bit for bit, as long as that server takes the rollout in one request
(server.max_batch_size).
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_eppo.megatron.offload import Offload
from nemo_eppo.rewards.sample import Sample
from nemo_eppo.rollout.batch import RolloutBatch
from nemo_eppo.servers.client import Rewards
from nemo_eppo.servers.endpoints import ENDPOINTS
from nemo_eppo.servers.protocol import Limits
from nemo_eppo.servers.steps import Steps
from nemo_eppo.settings.critic import ColocatedCriticConfig
from nemo_eppo.settings.rewards import ColocatedRewardConfig, RewardKind, RewardSourceConfig
from nemo_eppo.training.critic import CriticModel
from nemo_eppo.training.reward_service import RewardModel
from nemo_eppo.training.reward_sources import model_columns
from nemo_eppo.training.setup import Plan


class _LocalEndpoints:
    """Calls a service's endpoint functions on all ranks; on a GPU the model is on the device only during a call.

    Args:
        where: the config key of the service, for error messages.
        longest: tokens of the longest prompt and response together.

    Raises:
        ConfigError: the service's model has another tokenizer than the policy, or its window is below `longest`.
    """

    def __init__(self, service: CriticModel | RewardModel, where: str, actor: Plan, longest: int) -> None:
        service.plan.check_fits(f"{where}.restore_from_path", actor.tokenizer, "the policy", longest)
        self._service, self._steps, self.offload = service, Steps(service), Offload(service)
        self._limits = Limits(service.vocab_size, service.max_sequence_length, max_batch_size=sys.maxsize)

    def __call__(self, name: str, **tensors: Tensor) -> Any:
        endpoint = ENDPOINTS[name]
        arrays = endpoint.encode(tensors)
        endpoint.validate(arrays, self._limits)
        request = endpoint.decode(arrays)
        answer = self._steps.answered(endpoint, request)
        if answer is None:
            with self.offload.turn():
                answer = self._service.endpoints[name](request)
            self._steps.done(endpoint, request, answer)
        return answer


class ColocatedCritic:
    """A critic in the actor's processes, see `Critic`. The constructor checks files and settings; `build` is called
    once the ranks have joined. `values` and `train` compute nothing until the function that they return is called.

    Args:
        actor: the policy's plan; the critic shares its layout, precision and micro-batches.
        longest: tokens of the longest prompt and response together.
        updates: number of updates in the whole run, over which the learning rate decays unless decay_steps is set.

    Raises:
        ConfigError: the checkpoint does not fit.
    """

    def __init__(self, config: ColocatedCriticConfig, actor: Plan, longest: int, updates: int) -> None:
        where, optimizer = "critic.colocated", config.optimizer
        self._model = CriticModel(
            actor.setup.beside(config.restore_from_path, config.lora),
            optimizer.model_copy(update={"decay_steps": optimizer.decay_steps or updates}),
            config.value_clip,
            where=where,
        )
        self._call = _LocalEndpoints(self._model, where, actor, longest)
        self.updates = 0

    def build(self, directory: Path) -> None:
        """Build the model and load the newest of its checkpoints in the run directory `directory`; collective."""
        with self._call.offload.turn():
            self._model.build(directory, asynchronous=False)
        self.updates = self._model.step

    def values(self, batch: RolloutBatch, *, after_last: bool = False) -> Callable[[], Tensor]:
        padded = batch.with_padding(batch.sequence_length + 1) if after_last else batch
        return lambda: self._call("critic_infer", tokens=padded.tokens, lengths=padded.lengths)["values"]

    def train(self, batch: RolloutBatch, returns: Tensor, values: Tensor) -> Callable[[], dict[str, float]]:
        self.updates += 1
        step = torch.tensor([self.updates])
        return lambda: self._call(
            "critic_train",
            tokens=batch.tokens,
            lengths=batch.lengths,
            returns=returns,
            values=values,
            mask=batch.mask,
            step=step,
        )

    def turn(self) -> AbstractContextManager[None]:
        return self._call.offload.turn()

    def begin(self, run: int, updates: int, fresh: bool) -> None:
        """See `Critic`. Raises ServiceError if the critic belongs to another run or has no checkpoint of `updates`."""
        numbers = {"run": torch.tensor([run]), "fresh": torch.tensor([fresh]), "step": torch.tensor([updates])}
        self.updates = self._call("critic_begin", **numbers)

    def save(self, keep: Sequence[int]) -> tuple[str, Callable[[], object]]:
        """See `Critic`. The checkpoint is complete when this returns: megatron-core has one result queue for all
        writers of a process, so the actor's writers must not start before the critic's have ended."""
        path = self._call("critic_save", keep=torch.tensor([0, *keep]), step=torch.tensor([self.updates]))
        return path, lambda: path

    def close(self) -> None:
        """Nothing is held beyond the process."""


class ColocatedReward:
    """A reward model in the actor's processes, see `RewardSource`. The constructor checks files and settings; `build`
    is called once the ranks have joined.

    Args:
        key: the config key of the source, for error messages.
        actor: the policy's plan; the model shares its layout, precision and micro-batches.
        longest: tokens of the longest prompt and response together.

    Raises:
        ConfigError: the checkpoint does not fit, or the reward model is not of the expected kind.
    """

    def __init__(
        self,
        key: str,
        config: RewardSourceConfig,
        colocated: ColocatedRewardConfig,
        actor: Plan,
        longest: int,
        kind: RewardKind,
    ) -> None:
        where = f"{key}.colocated"
        self._model = RewardModel(actor.setup.beside(colocated.restore_from_path), where)
        self._call = _LocalEndpoints(self._model, where, actor, longest)
        self.columns = model_columns(config, where, self._model.statistics, kind)
        self.latent_size = self._model.latent_size

    def build(self) -> None:
        """Build the model; collective."""
        with self._call.offload.turn():
            self._model.build()

    def ask(self, batch: RolloutBatch, samples: Sequence[Sample]) -> Callable[[], Rewards]:
        """See `RewardSource`; the returned function computes the rewards."""

        def compute() -> Rewards:
            answer = self._call(
                "reward_infer", tokens=batch.tokens, prompt_lengths=batch.prompt_lengths, lengths=batch.lengths
            )
            return Rewards(answer["rewards"], answer.get("latents", torch.zeros(len(samples), 0)))

        return compute

    def close(self) -> None:
        """Nothing is held beyond the process."""
