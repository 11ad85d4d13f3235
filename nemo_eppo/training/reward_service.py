"""The reward job: a trained reward model behind a server, with the statistics that standardise its scores."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from pydantic import Field

from nemo_eppo.algorithms.preference import sequence_score
from nemo_eppo.config import Config, ConfigError
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.observability.experiment import ExpManagerConfig, Run
from nemo_eppo.servers.server import serve
from nemo_eppo.servers.service import ServerConfig, Tensors
from nemo_eppo.training.setup import ModelSetup, build, plan


class RewardModelConfig(Config):
    """The reward job (conf/serve_reward_model.yaml)."""

    exp_manager: ExpManagerConfig = ExpManagerConfig()
    seed: int = Field(1234, ge=0)
    """Has no effect on a trained model."""
    model: ModelSetup
    """A checkpoint of train_reward_model.py."""
    server: ServerConfig = ServerConfig()


class RewardModel:
    """A reward model on this job's ranks: checked when it is made, built once the ranks have joined."""

    def __init__(self, setup: ModelSetup, where: str = "model") -> None:
        self.plan = plan(setup, where, head="scalar")
        assert self.plan.manifest is not None
        state = self.plan.manifest.state
        missing = [name for name in ("score", "mean", "std") if name not in state]
        if missing:
            raise ConfigError(
                f"{where}: {self.plan.source} has no {', '.join(missing)}: it is a critic, not a trained reward model"
            )
        self.score, self.mean, self.std = state["score"], float(state["mean"]), float(state["std"])
        self.tokenizer_digest = self.plan.tokenizer.digest()
        self._runner: ModelRunner | None = None

    def build(self) -> None:
        """Load the weights; collective."""
        self._runner = build(self.plan, "scalar")

    def statistics(self) -> dict[str, Any]:
        """For the status reply: k, and mean and std of each of the k models on its validation data."""
        return {"k": 1, "mean": [self.mean], "std": [self.std]}

    def infer(self, request: Tensors) -> Tensors:
        """tokens [B, S], prompt_lengths [B], lengths [B] -> raw rewards [B, 1]."""
        assert self._runner is not None
        out, _ = self._runner.infer(request["tokens"], request["lengths"], outputs=1)
        scores = sequence_score(out[..., 0], request["prompt_lengths"], request["lengths"], self.score)
        return {"rewards": scores.unsqueeze(1)}


class RewardService:
    """One reward model as a job of its own."""

    name = "reward"

    def __init__(self, config: RewardModelConfig) -> None:
        self._model = RewardModel(config.model)
        runtime.initialize(config.model.parallel, config.seed)
        self._model.build()
        self.vocab_size = self._model.plan.model.vocab_size
        self.max_sequence_length = self._model.plan.model.max_sequence_length
        self.endpoints: Mapping[str, Callable[[Tensors], Any]] = {"reward_infer": self._model.infer}
        self.step = 0

    def status(self) -> dict[str, Any]:
        """The tokenizer and the statistics."""
        return {"tokenizer": self._model.tokenizer_digest, "reward": self._model.statistics()}


def serve_reward_model(config: RewardModelConfig, run: Run) -> None:
    """Build the reward model and serve until the job is told to stop."""
    serve(RewardService(config), config.server, group=dist.new_group(backend="gloo"))
    runtime.shutdown()
