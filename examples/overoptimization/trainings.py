"""The trainings of the bench: SFT models, reward models with labels of their own, and policies by every method."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from packages import write_packages

from nemo_eppo.config import ConfigT
from nemo_eppo.entry.settings import Source, as_yaml, check
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.ppo import PPOConfig
from nemo_eppo.settings.reward_model import RewardTrainingConfig
from nemo_eppo.settings.run import ExpManagerConfig
from nemo_eppo.settings.training import SFTConfig
from nemo_eppo.tools.noun_task import MAX_RESPONSE_TOKENS, write_noun_task
from nemo_eppo.training.ppo_loop import train_ppo
from nemo_eppo.training.reward_model import train_reward_model
from nemo_eppo.training.sft import train_sft

CONF = Path(__file__).resolve().parents[2] / "conf"
SINGLE = "single"  # kind of reward models: one Bradley-Terry model
MEMBERS = 3  # Bradley-Terry models of an ensemble; the single one is the first


@dataclass(frozen=True)
class Size:
    """Shape of all models, and hyperparameters of their trainings."""

    layers: int
    width: int
    mlp: int
    sft_lr: float
    reward_lr: float
    ppo_lr: float
    reward_steps: int = 800
    reward_l2: float = 0.001
    pairs: int = 16_000
    """Preference pairs, unless the labels are scarce."""


SIZES = {
    "0.2M": Size(4, 64, 192, 4e-3, 2e-3, 2e-4),
    "1M": Size(6, 128, 320, 3e-3, 5e-4, 1e-4, 2400, 0.02, 76_800),
    "5M": Size(8, 256, 576, 2e-3, 3e-4, 5e-5, 2400, 0.02, 76_800),
    "30M": Size(8, 512, 1408, 1e-3, 3e-4, 2e-5),
    "100M": Size(12, 768, 2048, 6e-4, 1e-4, 1e-5),
}


@dataclass(frozen=True)
class Text:
    """A task: its data, gold reward and lengths in tokens."""

    write: Callable[..., None]
    """Writes tokenizer and files: (directory, seed, sft_examples=, preference_pairs=, hedge_bias=)."""
    gold: str
    """Reward function."""
    prompt_tokens: int
    """Longest prompt; longer ones are dropped."""
    response_tokens: int
    """Longest response of a policy."""
    window: int


TEXTS = {
    "nouns": Text(write_noun_task, "nemo_eppo.tools.noun_task:gold_reward", 16, MAX_RESPONSE_TOKENS, 48),
    "packages": Text(write_packages, "packages:gold_reward", 96, 32, 192),
}


@dataclass(frozen=True)
class Labels:
    """The flaw of the preference labels."""

    hedge_bias: float
    """Share of the labels that favours hedges."""
    pairs: int | None
    """Their number; None for that of the size."""


LABELS = {"hedges": Labels(0.5, None), "scarce": Labels(0.0, 3_000)}


@dataclass(frozen=True)
class Effort:
    """How long everything is trained."""

    sft_steps: int = 1250
    steps: int = 60
    validate_every: int = 5
    validation_prompts: int = 256


@dataclass(frozen=True)
class Task:
    """Models of one size and labels of one kind, with all their files below `directory`."""

    directory: Path
    text: Text
    size: Size
    labels: Labels
    effort: Effort

    @property
    def sft(self) -> Path:
        return self.directory / "sft"

    def labels_of(self, seed: int) -> Path:
        return self.directory / f"seed_{seed}" / "labels"

    def rewards(self, seed: int, kind: str) -> Path:
        return self.directory / f"seed_{seed}" / "rewards" / kind

    def policy(self, seed: int, variant: str) -> Path:
        return self.directory / f"seed_{seed}" / "policies" / variant

    def train_sft(self) -> None:
        """Train the model from which every policy and reward model of this task starts."""
        size, data = self.size, self.sft / "data"
        self._write_data(data, seed=0)
        _train(
            ("gpt_sft", SFTConfig, train_sft),
            self.sft,
            {
                "seed": 0,
                "model.architecture": {
                    "num_layers": size.layers, "hidden_size": size.width, "ffn_hidden_size": size.mlp,
                    "num_attention_heads": max(4, size.width // 64), "max_sequence_length": self.text.window,
                    "rotary_base": 100, "init_std": 0.05,
                },
                "model.tokenizer": data / "tokenizer",
                **_fit(data, "sft", self.effort.sft_steps, size.sft_lr),
            },
        )  # fmt: skip

    def write_labels(self, seed: int) -> None:
        """Write the preference labels of this seed."""
        self._write_data(self.labels_of(seed) / "data", seed)

    def train_rewards(self, seed: int, kind: str) -> None:
        """Train reward models of one kind on the labels of this seed."""
        data = self.labels_of(seed) / "data"
        _train(
            ("gpt_reward_model", RewardTrainingConfig, train_reward_model),
            self.rewards(seed, kind),
            {
                "seed": seed + (kind == "ensemble"),  # seeds of the members; the single model has the seed before
                "model.restore_from_path": self.sft / "checkpoints",
                "reward.score": "sum",
                "reward.l2": self.size.reward_l2,
                **_fit(data, "preferences", self.size.reward_steps, self.size.reward_lr),
                **_REWARDS[kind](self, data),
            },
        )

    def train_policy(self, seed: int, variant: str, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Train a policy against the reward models of a seed.

        Args:
            variant: name of its directory.
            entry: the method's entry in methods.yaml.
            settings: settings of the method, with the chosen values.
        """
        method, lr, effort = entry.get("method", "ppo"), self.size.ppo_lr, self.effort
        if term := entry.get("term"):
            own = {"name": "own", "term": f"terms:{term}", "settings": dict(settings)}
            settings = {"shaping.terms": [own], **entry.get("actor", {})}
        [single] = self._scorers(seed, SINGLE)
        _train(
            ("gpt_ppo_actor", PPOConfig, train_ppo),
            self.policy(seed, variant),
            {
                "seed": seed,
                "model.restore_from_path": self.sft / "checkpoints",
                "model.precision": "fp32",
                "model.micro_batch_size": 64,
                "data.train": self.sft / "data" / "prompts.train.jsonl",
                "data.validation": self.sft / "data" / "prompts.validation.jsonl",
                "data.max_prompt_length": self.text.prompt_tokens,
                "data.too_long": "drop",
                "generation.max_new_tokens": self.text.response_tokens,
                "ppo.max_steps": effort.steps,
                "ppo.mini_batch_size": 32,
                "ppo.epochs": 2,
                "ppo.old_logprobs": "engine",
                "shaping.missing_eos.penalty": 2,
                "optimizer.lr": lr,
                "optimizer.weight_decay": 0.0,
                "validation": {"max_prompts": effort.validation_prompts, "interval": effort.validate_every},
                "checkpoint.interval": 0,
                "gold_reward": self.text.gold,
                "rewards": [
                    {"colocated": {"restore_from_path": str(path)}}
                    for path in self._scorers(seed, entry.get("rewards", SINGLE))
                ],
                **({} if "grpo" in method else {"critic": _critic(single, lr)}),
                **settings,
            },
            method=method,
        )

    def _scorers(self, seed: int, kind: str) -> list[Path]:
        """Return the checkpoints of a seed's reward models of one kind."""
        if kind == "ensemble":
            others = [self.rewards(seed, kind) / f"member_{index}" / "checkpoints" for index in range(MEMBERS - 1)]
            return [*self._scorers(seed, SINGLE), *others]
        return [self.rewards(seed, kind) / ("average" if kind == "warm" else "checkpoints")]

    def _write_data(self, directory: Path, seed: int) -> None:
        if not directory.exists():
            pairs = self.labels.pairs or self.size.pairs
            self.text.write(
                directory,
                seed,
                sft_examples=min(20_000, 32 * self.effort.sft_steps),
                preference_pairs=min(pairs, 32 * self.size.reward_steps),
                hedge_bias=self.labels.hedge_bias,
            )


_REWARDS: dict[str, Callable[[Task, Path], dict[str, Any]]] = {
    SINGLE: lambda task, data: {},
    "ensemble": lambda task, data: {"ensemble.members": MEMBERS - 1},
    "warm": lambda task, data: {
        "ensemble": {"members": 3, "lrs": [0.5 * task.size.reward_lr, task.size.reward_lr], "dropouts": [0.0, 0.05]},
        "ensemble.linear_probe_steps": max(1, task.size.reward_steps // 10),
        "ensemble.average": True,
    },
    "odin": lambda task, data: {"reward.kind": "odin"},
    "inform": lambda task, data: {
        "reward.kind": "inform",
        "reward.score": "last",  # InfoRM has no other
        "reward.inform": {"latent_size": 16, "beta": 0.01, "sft_responses": str(data / "sft.validation.jsonl")},
    },
}
"""Settings of each kind of reward models."""


def _fit(data: Path, kind: str, steps: int, lr: float) -> dict[str, Any]:
    return {
        "data.train": data / f"{kind}.train.jsonl",
        "data.validation": data / f"{kind}.validation.jsonl",
        "model.precision": "fp32",  # the same numbers on all machines
        "model.micro_batch_size": 32,
        "fit.global_batch_size": 32,
        "fit.max_steps": steps,
        "checkpoint.interval": 0,
        "optimizer.lr": lr,
        "optimizer.schedule": "cosine",
        "optimizer.warmup_steps": min(20, steps // 2),
    }


def _critic(checkpoint: Path, lr: float) -> dict[str, Any]:
    return {"colocated": {"restore_from_path": str(checkpoint), "optimizer": {"lr": lr, "weight_decay": 0.0}}}


def _train(
    job: tuple[str, type[ConfigT], Callable[[ConfigT, Run], None]],
    directory: Path,
    values: Mapping[str, Any],
    method: str | None = None,
) -> None:
    """Run a job in this process as its script would, with these settings over those of its file in conf/."""
    name, schema, main = job
    composed = Source(name, [CONF], [f"method={method}"] if method else []).compose()
    for key, value in values.items():
        OmegaConf.update(composed, key, str(value) if isinstance(value, Path) else value, force_add=True)
    config = check(schema, composed)
    (directory / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
    main(config, Run(directory, 0, logging.getLogger("nemo_eppo"), ExpManagerConfig(create_tensorboard_logger=False)))
