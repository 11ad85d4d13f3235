"""Bradley-Terry training of a reward model on preference pairs."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from nemo_eppo.algorithms.preference import (
    ScoreReduction,
    bradley_terry_loss,
    preference_metrics,
    sequence_score,
)
from nemo_eppo.config import Config
from nemo_eppo.data.datasets import PreferenceDataset, PreferenceItem, collate
from nemo_eppo.megatron.model import Head
from nemo_eppo.megatron.optimizer import OptimizerConfig
from nemo_eppo.megatron.runner import LossFunction, ModelRunner, Rows
from nemo_eppo.observability.experiment import ExpManagerConfig, Run
from nemo_eppo.training.fit import FitSettings, TextDataConfig, fit
from nemo_eppo.training.setup import ModelSetup, Plan, plan

_VALIDATION_PAIRS = 128  # per forward pass over all ranks; bounds memory, changes nothing


class BradleyTerryConfig(Config):
    """The loss and the score."""

    score: ScoreReduction = "last"
    """A response's score: the head's output at its last token, or the sum or mean over its tokens."""
    margin: float = Field(0.0, ge=0)
    """By how much the chosen response should lead."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a label is wrong."""
    l2: float = Field(0.0, ge=0)
    """Weight of the squared scores, which keeps them near zero."""


class RewardTrainingConfig(Config):
    """The reward-model training job (conf/gpt_reward_model.yaml)."""

    exp_manager: ExpManagerConfig = ExpManagerConfig()
    seed: int = Field(1234, ge=0)
    """Of the head's fresh weights and of the order of pairs."""
    model: ModelSetup
    """Usually the SFT model; it gets a fresh head."""
    data: TextDataConfig
    """Rows {"prompt", "chosen", "rejected"}."""
    reward: BradleyTerryConfig = BradleyTerryConfig()
    fit: FitSettings = FitSettings()
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)


class RewardTask:
    """Row 2i is the chosen response of pair i, row 2i + 1 the rejected one."""

    title: ClassVar[str] = "Reward model"
    head: ClassVar[Head] = "scalar"
    group: ClassVar[int] = 2
    columns: ClassVar[Mapping[str, str]] = {
        "loss": "train/loss",
        "accuracy": "train/accuracy",
        "validation accuracy": "validation/accuracy",
    }

    def __init__(self, data: TextDataConfig, loss: BradleyTerryConfig, plan: Plan) -> None:
        longest = data.max_sequence_length or plan.model.max_sequence_length
        self.config, self.pad_id = loss, plan.tokenizer.pad_id
        self.train, self.validation = (
            PreferenceDataset(path, plan.tokenizer, max_sequence_length=longest, too_long=data.too_long)
            for path in (data.train, data.validation)
        )
        self._mean, self._std = 0.0, 1.0

    def __len__(self) -> int:
        return len(self.train)

    def rows(self, indices: list[int]) -> Rows:
        return self._rows([self.train[index] for index in indices])

    def _rows(self, items: list[PreferenceItem]) -> Rows:
        sides = [(item.prompt_ids, ids) for item in items for ids in (item.chosen_ids, item.rejected_ids)]
        tokens, prompts, lengths = collate(sides, self.pad_id)
        return {"tokens": tokens, "prompt_lengths": prompts, "lengths": lengths}

    def loss_function(self, rows: Rows) -> LossFunction:
        pairs = rows["lengths"].numel() / 2
        config = self.config

        def loss(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
            scores = sequence_score(output[..., 0], rows["prompt_lengths"], rows["lengths"], config.score)
            chosen, rejected = scores[0::2], scores[1::2]
            value = bradley_terry_loss(
                chosen,
                rejected,
                margin=config.margin,
                label_smoothing=config.label_smoothing,
                l2=config.l2,
                denominator=pairs,
            )
            return value, {"accuracy": (chosen > rejected).sum() / pairs}

        return loss

    def validate(self, runner: ModelRunner) -> dict[str, float]:
        scores, lengths = [], []
        for start in range(0, len(self.validation), _VALIDATION_PAIRS):
            rows = self._rows(self.validation.items[start : start + _VALIDATION_PAIRS])
            out, _ = runner.infer(rows["tokens"], rows["lengths"], outputs=1)
            scores.append(sequence_score(out[..., 0], rows["prompt_lengths"], rows["lengths"], self.config.score))
            lengths.append(rows["lengths"] - rows["prompt_lengths"])
        score, length = torch.cat(scores).double(), torch.cat(lengths)
        self._mean, self._std = float(score.mean()), float(score.std(correction=0))
        metrics = preference_metrics(score[0::2], score[1::2], length[0::2], length[1::2])
        return {f"validation/{name}": value for name, value in metrics.items()}

    def state(self) -> dict[str, object]:
        """How the score is read, and its mean and standard deviation over both sides of the validation pairs."""
        return {"score": self.config.score, "mean": self._mean, "std": self._std}


def train_reward_model(config: RewardTrainingConfig, run: Run) -> None:
    """The reward-model training job."""
    model = plan(config.model)
    fit(RewardTask(config.data, config.reward, model), model, config.fit, config.optimizer, config.seed, run)
