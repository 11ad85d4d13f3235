"""Scores, and latents, of given responses by a trained reward model, equal to its server's but without one."""

from collections.abc import Sequence
from typing import Any

import torch

from nemo_eppo.config import ConfigError
from nemo_eppo.data.datasets import collate
from nemo_eppo.evaluation.model_rows import WINDOW, append_rows
from nemo_eppo.evaluation.responses import Response
from nemo_eppo.evaluation.rows_file import RowsFile
from nemo_eppo.evaluation.score import model_name
from nemo_eppo.files import json_line
from nemo_eppo.megatron import runtime
from nemo_eppo.servers.client import Rewards
from nemo_eppo.settings.model import ModelSetup
from nemo_eppo.training.reward_service import RewardModel


class RewardScoring:
    """Scores responses by a trained reward model, in any layout.

    Creating it checks files and layout. The first `append` loads the weights; they stay as long as this object.

    Args:
        setup: a checkpoint of train_reward_model.py, a directory of checkpoints, of which the newest is read, or a
            Hugging Face *ForSequenceClassification directory, as `RewardServerConfig.model` explains.
        where: the option that names the model, for messages.

    Raises:
        ConfigError: it is no trained reward model, its files are damaged, or the layout does not fit.
    """

    def __init__(self, setup: ModelSetup, where: str) -> None:
        self._path, self._where = setup.restore_from_path, where
        self.model = RewardModel(setup, where, ranks=setup.parallel.model_parallel_size)
        self.plan = self.model.plan
        self._built = False

    @property
    def identity(self) -> dict[str, Any]:
        """The settings, beside the responses, that the rows depend on; for `RowsFile`."""
        return {"model": model_name(self.plan.source), "precision": self.plan.setup.precision}

    def score(self, rows: Sequence[Response]) -> Rewards:
        """Score responses: raw rewards [N, 1], and latents [N, d] (d = 0 unless the model is an InfoRM); collective.

        Latents of SFT responses have mean 0 and covariance I, so that a latent's norm is its Mahalanobis distance.
        """
        self._load()
        tokens, prompt_lengths, lengths = collate([row[:2] for row in rows], self.plan.tokenizer.pad_id)
        out = self.model.infer({"tokens": tokens, "prompt_lengths": prompt_lengths, "lengths": lengths})
        rewards = Rewards(out["rewards"], out.get("latents", torch.zeros(len(rows), 0)))
        bad = ~torch.isfinite(torch.cat(rewards, dim=1)).all(dim=1)
        if bad.any():
            row = rows[int(bad.nonzero()[0])]
            raise ConfigError(f"{self._where}: {self._path} gives NaN or infinity for the response in line {row.line}")
        return rewards

    def append(self, rows: Sequence[Response], output: RowsFile, what: str = "") -> None:
        """Append the missing rows {"reward", "score"}, with "latents" if the model has them, to the output; collective.

        `reward` is the raw reward, `score` is standardised by its validation mean and std as in training.

        Args:
            what: text for the progress bar.

        Raises:
            ConfigError: a response has a token outside the model's vocabulary.
        """
        if output.done == len(rows):
            return
        for row in rows:
            if (largest := max(row.prompt.max(), row.response.max())) >= self.model.vocab_size:
                raise ConfigError(
                    f"{self._where}: the response in line {row.line} has the token id {largest}, but {self._path} has "
                    f"a vocabulary of {self.model.vocab_size}"
                )
        statistics = self.model.statistics
        (mean,), (std,) = statistics["mean"], statistics["std"]

        def lines(window: slice) -> list[str]:
            return reward_lines(self.score(rows[window]), mean, std)

        self._load()  # joins the ranks, which append_rows expects
        append_rows(output, len(rows), self.plan.setup.micro_batch_size * WINDOW, lines, what)

    def _load(self) -> None:
        if not self._built:
            runtime.initialize(self.plan.setup.parallel, seed=0)
            self.model.build()
            self._built = True


def reward_lines(rewards: Rewards, mean: float, std: float) -> list[str]:
    """Make the output line of each response: {"reward", "score"}, and "latents" if there are any."""
    raw = [float(str(reward)) for reward in rewards.rewards[:, 0].numpy()]  # -0.15, not -0.15000000596046448
    return [
        json_line({"reward": reward, "score": (reward - mean) / std} | ({"latents": latent} if latent else {}))
        for reward, latent in zip(raw, rewards.latents.tolist(), strict=True)
    ]
