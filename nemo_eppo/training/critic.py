"""The critic job: a value model that serves values and learns from what the actor sends; a reward model if asked to."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from nemo_eppo.algorithms.policy import value_loss
from nemo_eppo.config import Config, ConfigError
from nemo_eppo.megatron import checkpoint, runtime
from nemo_eppo.megatron.optimizer import OptimizerConfig
from nemo_eppo.megatron.runner import Rows
from nemo_eppo.observability.experiment import ExpManagerConfig, Run
from nemo_eppo.servers.protocol import ServiceError
from nemo_eppo.servers.server import serve
from nemo_eppo.servers.service import ServerConfig, Tensors
from nemo_eppo.training.reward_service import RewardModel
from nemo_eppo.training.setup import ModelSetup, build, plan

CHECKPOINTS = "checkpoints"


class CriticSettings(Config):
    """How the value model learns."""

    value_clip: float | None = Field(0.2, gt=0)
    """Values are clipped to within this of those of the rollout; null for no clipping."""
    total_updates: int = Field(1, ge=1)
    """Updates over which a decaying learning rate falls: PPO steps x epochs x mini-batches."""
    keep: int = Field(2, ge=1)
    """Checkpoints to keep."""


class CriticConfig(Config):
    """The critic job (conf/gpt_ppo_critic.yaml)."""

    exp_manager: ExpManagerConfig = ExpManagerConfig()
    seed: int = Field(1234, ge=0)
    """Of fresh weights."""
    model: ModelSetup
    """Usually the reward model; a language model gets a fresh value head."""
    reward_model: Path | None = None
    """A reward model that this job serves as well, in the critic's layout and precision."""
    critic: CriticSettings = CriticSettings()
    optimizer: OptimizerConfig = OptimizerConfig()
    server: ServerConfig = ServerConfig()


class CriticService:
    """Values and updates of the critic. One mini-batch is one update; `step` counts them."""

    name = "critic"

    def __init__(self, config: CriticConfig, directory: Path) -> None:
        self._config, self._directory = config, directory
        self._plan = plan(config.model)
        self._reward = None
        if config.reward_model is not None:
            self._reward = RewardModel(
                config.model.model_copy(
                    update={
                        "restore_from_path": config.reward_model,
                        "architecture": None,
                        "tokenizer": None,
                        "lora": None,
                    }
                ),
                "reward_model",
            )
            if self._reward.tokenizer_digest != self._plan.tokenizer.digest():
                raise ConfigError(f"reward_model: {config.reward_model} has another tokenizer than the critic")
        runtime.initialize(config.model.parallel, config.seed)
        resume = checkpoint.latest(directory / CHECKPOINTS)
        self._runner = build(
            self._plan, "scalar", optimizer=config.optimizer, total_steps=config.critic.total_updates, resume=resume
        )
        self._step = checkpoint.read_manifest(resume).step if resume else 0
        if self._reward is not None:
            self._reward.build()
        self.vocab_size = self._plan.model.vocab_size
        # one more than the model's window: the value after the last token of the longest response can be asked for
        self.max_sequence_length = self._plan.model.max_sequence_length + 1
        self.endpoints: Mapping[str, Callable[[Tensors], Any]] = {
            "critic_infer": self._infer,
            "critic_train": self._train,
            "critic_save": self._save,
            **({"reward_infer": self._reward.infer} if self._reward else {}),
        }

    @property
    def step(self) -> int:
        """Updates made so far."""
        return self._step

    def status(self) -> dict[str, Any]:
        """The tokenizer, and the reward model's statistics if there is one."""
        reward = {"reward": self._reward.statistics()} if self._reward else {}
        return {"tokenizer": self._plan.tokenizer.digest(), **reward}

    def _infer(self, request: Tensors) -> Tensors:
        values, _ = self._runner.infer(request["tokens"], request["lengths"], outputs=1)
        return {"values": values[:, :-1, 0].contiguous()}

    def _train(self, request: Tensors) -> dict[str, float]:
        tokens = float(request["mask"].sum())
        clip = self._config.critic.value_clip

        def loss_function(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
            loss, stats = value_loss(output[:, :-1, 0], rows["values"], rows["returns"], rows["mask"], clip, tokens)
            return loss, {"value_clip_fraction": stats.clipped / tokens}

        rows = {name: request[name] for name in ("tokens", "lengths", "returns", "values", "mask")}
        try:
            metrics = self._runner.train_step(rows, loss_function)
        except FloatingPointError as error:
            raise ServiceError(f"critic update {self._step + 1}: {error}") from None
        self._step += 1
        return metrics

    def _save(self, request: Tensors) -> str:
        manifest = checkpoint.Manifest(head="scalar", step=self._step, model=self._plan.model, optimizer=True)
        path = checkpoint.save(
            self._directory / CHECKPOINTS / f"step_{self._step:06d}",
            self._runner,
            manifest,
            self._plan.tokenizer_path,
            keep=self._config.critic.keep,
        )
        return str(path)


def serve_critic(config: CriticConfig, run: Run) -> None:
    """Build the critic and serve until the job is told to stop."""
    serve(CriticService(config, run.directory), config.server, group=dist.new_group(backend="gloo"))
    runtime.shutdown()
