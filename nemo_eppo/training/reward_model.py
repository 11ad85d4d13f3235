"""Training of a reward model on preference pairs."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from nemo_eppo.algorithms.latents import Gaussian, fit_gaussian
from nemo_eppo.algorithms.preference import preference_metrics
from nemo_eppo.data.datasets import PreferenceDataset, PreferenceItem, SFTDataset, TokenIds, collate
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.runner import LossFunction, ModelRunner, Rows
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.reward_model import RewardLossConfig, RewardTrainingConfig
from nemo_eppo.settings.training import TextDataConfig
from nemo_eppo.training.fit import VALIDATION_ROWS, Fit, Task
from nemo_eppo.training.reward_ensemble import average_members, check_ensemble, train_members
from nemo_eppo.training.reward_losses import LOSSES
from nemo_eppo.training.reward_service import score_and_latents, store_gaussian
from nemo_eppo.training.setup import Plan, plan

_SFT_RESPONSES = 2048  # SFT responses, at most, to whose latents the Gaussian is fitted


class RewardTask(Task):
    """Training on pairs; row 2i is the chosen response of pair i, row 2i + 1 the rejected one."""

    title: ClassVar[str] = "Reward model"
    group: ClassVar[int] = 2
    columns: ClassVar[Mapping[str, str]] = {
        "loss": "train/loss",
        "accuracy": "train/accuracy",
        "validation accuracy": "validation/accuracy",
    }
    validated: ClassVar[tuple[str, ...]] = ("validation/accuracy", "validation/margin", "validation/ece")

    def __init__(self, data: TextDataConfig, config: RewardLossConfig, plan: Plan, seed: int) -> None:
        longest = data.longest(plan.model.max_sequence_length)
        self.config, self.pad_id = config, plan.tokenizer.pad_id
        self.loss = LOSSES[config.kind](config, seed)
        self.head, self.latent_size = self.loss.head, self.loss.latent_size
        self.train, self.validation = (
            PreferenceDataset(path, plan.tokenizer, max_sequence_length=longest, too_long=data.too_long)
            for path in (data.train, data.validation)
        )
        self._mean, self._std = 0.0, 1.0
        self._gaussian: Gaussian | None = None
        self._sft_sides: list[tuple[TokenIds, TokenIds]] = []
        if config.kind == "inform" and config.inform.sft_responses is not None:
            responses = SFTDataset(
                config.inform.sft_responses, plan.tokenizer, max_sequence_length=longest, too_long=data.too_long
            )
            self._sft_sides = [(item.prompt_ids, item.response_ids) for item in responses.items[:_SFT_RESPONSES]]

    def rows(self, indices: list[int]) -> Rows:
        return self._rows(_sides([self.train[index] for index in indices]))

    def prepare(self, rows: Rows, runner: ModelRunner, step: int) -> Rows:
        return self.loss.prepare(rows, runner, step)

    def _rows(self, sides: list[tuple[TokenIds, TokenIds]]) -> Rows:
        tokens, prompts, lengths = collate(sides, self.pad_id)
        return {"tokens": tokens, "prompt_lengths": prompts, "lengths": lengths}

    def loss_function(self, rows: Rows) -> LossFunction:
        pairs = rows["lengths"].numel() / 2
        return lambda output, rows: self.loss(output, rows, pairs)

    def validate(self, runner: ModelRunner) -> dict[str, float]:
        scores, lengths = [], []
        for rows, out in self._infer(runner, _sides(self.validation.items)):
            scores.append(out[:, 0])
            lengths.append(rows["lengths"] - rows["prompt_lengths"])
        score, length = torch.cat(scores).double(), torch.cat(lengths)
        self._mean, self._std = float(score.mean()), float(score.std(correction=0))
        if self._sft_sides:
            self._gaussian = fit_gaussian(torch.cat([out[:, 1:] for _, out in self._infer(runner, self._sft_sides)]))
        metrics = preference_metrics(score[0::2], score[1::2], length[0::2], length[1::2])
        return {f"validation/{name}": value for name, value in metrics.items()}

    def _infer(self, runner: ModelRunner, sides: list[tuple[TokenIds, TokenIds]]) -> Iterator[tuple[Rows, Tensor]]:
        """Yield rows of up to VALIDATION_ROWS sides, with their scores and latents [n, 1 + d]."""
        read = partial(score_and_latents, how=self.config.score, latent_size=self.latent_size)
        for start in range(0, len(sides), VALIDATION_ROWS):
            rows = self._rows(sides[start : start + VALIDATION_ROWS])
            yield rows, runner.infer_rows(rows, read, outputs=1 + self.latent_size)

    def state(self) -> dict[str, Any]:
        """Return how the score is read, its mean and standard deviation over both sides of the validation pairs, and
        the Gaussian of the SFT responses' latents if there is one."""
        latents = {} if self._gaussian is None else {"sft_latents": store_gaussian(self._gaussian)}
        return self.config.state(self._mean, self._std) | latents


def _sides(items: list[PreferenceItem]) -> list[tuple[TokenIds, TokenIds]]:
    return [(item.prompt_ids, ids) for item in items for ids in (item.chosen_ids, item.rejected_ids)]


def train_reward_model(config: RewardTrainingConfig, run: Run) -> None:
    """Run the reward-model training job."""
    model = plan(config.model)
    task = RewardTask(config.data, config.reward, model, config.seed)
    check_ensemble(config.ensemble, model, task.head, config.optimizer)
    fit = Fit.of(config, task, model, run)
    members = train_members(config.ensemble, fit)
    if config.ensemble.average:
        average_members(config.ensemble, members, fit)
    runtime.shutdown()
