"""Supervised fine-tuning: maximum likelihood of demonstrated responses."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from nemo_eppo.algorithms.masking import masked_sum, response_mask
from nemo_eppo.data.datasets import SequenceItem, SFTDataset, collate
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.runner import LossFunction, ModelRunner, Rows
from nemo_eppo.observability.run import Run
from nemo_eppo.settings.model import Head
from nemo_eppo.settings.training import SFTConfig, TextDataConfig
from nemo_eppo.training.fit import VALIDATION_ROWS, Fit, Task
from nemo_eppo.training.policy import next_token_targets
from nemo_eppo.training.setup import Plan, plan


class SFTTask(Task):
    """Minimizes the cross-entropy of response tokens, or of all tokens that another one precedes."""

    title: ClassVar[str] = "SFT"
    head: Head = "lm"
    columns: ClassVar[Mapping[str, str]] = {
        "loss": "train/loss",
        "tokens/s": "train/tokens_per_second",
        "validation loss": "validation/loss",
    }
    validated: ClassVar[tuple[str, ...]] = ("validation/loss", "validation/perplexity")

    def __init__(self, data: TextDataConfig, plan: Plan, *, answer_only_loss: bool) -> None:
        longest = data.longest(plan.model.max_sequence_length)
        self.pad_id, self.answer_only_loss = plan.tokenizer.pad_id, answer_only_loss
        self.train, self.validation = (
            SFTDataset(path, plan.tokenizer, max_sequence_length=longest, too_long=data.too_long)
            for path in (data.train, data.validation)
        )

    def rows(self, indices: list[int]) -> Rows:
        return self._rows([self.train[index] for index in indices])

    def _rows(self, items: list[SequenceItem]) -> Rows:
        tokens, prompts, lengths = collate([(item.prompt_ids, item.response_ids) for item in items], self.pad_id)
        learnt_from = prompts if self.answer_only_loss else torch.ones_like(prompts)
        mask = response_mask(learnt_from, lengths, tokens.size(1))
        return {"tokens": tokens, "lengths": lengths, "mask": mask, "targets": next_token_targets(tokens, mask)}

    def loss_function(self, rows: Rows) -> LossFunction:
        tokens = float(rows["mask"].sum())

        def loss(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
            return -masked_sum(output[:, :-1, 0], rows["mask"]) / tokens, {}

        return loss

    def validate(self, runner: ModelRunner) -> dict[str, float]:
        total = count = 0.0
        for start in range(0, len(self.validation), VALIDATION_ROWS):
            rows = self._rows(self.validation.items[start : start + VALIDATION_ROWS])
            out, _ = runner.infer(rows["tokens"], rows["lengths"], rows["targets"], outputs=2)
            total -= float(masked_sum(out[:, :-1, 0], rows["mask"]))
            count += float(rows["mask"].sum())
        loss = total / count
        return {"validation/loss": loss, "validation/perplexity": math.exp(min(loss, 50.0))}


def train_sft(config: SFTConfig, run: Run) -> None:
    """Run the SFT job."""
    model = plan(config.model, head="lm")
    task = SFTTask(config.data, model, answer_only_loss=config.answer_only_loss)
    Fit.of(config, task, model, run).train()
    runtime.shutdown()
