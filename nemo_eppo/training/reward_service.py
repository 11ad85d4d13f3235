"""The reward job: serves a trained reward model and the statistics that standardise its scores."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemo_eppo.algorithms.choices import ScoreReduction
from nemo_eppo.algorithms.latents import Gaussian
from nemo_eppo.algorithms.preference import sequence_score
from nemo_eppo.config import ConfigError
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.runner import ModelRunner, Rows
from nemo_eppo.models.checkpoint_files import pack_array, unpack_array
from nemo_eppo.models.hf_directory import REWARD_KEY, HfDirectory
from nemo_eppo.observability.run import Run
from nemo_eppo.servers.endpoints import ENDPOINTS
from nemo_eppo.servers.server import check_server, serve
from nemo_eppo.servers.service import Tensors
from nemo_eppo.settings.model import ModelSetup
from nemo_eppo.settings.reward_model import RewardServerConfig
from nemo_eppo.training.setup import Plan, build, plan


class RewardModel:
    """A reward model on this job's ranks; a `Service` for any server or none.

    The constructor checks files and settings; `build` is called once the ranks have joined.

    Args:
        where, ranks: see `plan`.
    """

    name = "reward"
    step = 0
    runner: ModelRunner

    def __init__(self, setup: ModelSetup, where: str = "model", ranks: int | None = None) -> None:
        self.plan = plan(setup, where, head="scalar", ranks=ranks)
        self.statistics = read_statistics(self.plan, where)
        """For the status reply: k, mean and std of each of k models on validation data, kind, latent size."""
        assert self.plan.manifest is not None
        state = self.plan.manifest.state
        self.score, self.head = state["score"], self.plan.manifest.head
        self.latent_size: int = self.statistics["latent_size"]
        self._gaussian = read_gaussian(state["sft_latents"]) if self.latent_size else None
        self.vocab_size, self.max_sequence_length = self.plan.model.vocab_size, self.plan.model.max_sequence_length
        self.endpoints: Mapping[str, Callable[[Tensors], Any]] = {"reward_infer": self.infer}

    def build(self) -> None:
        """Load the weights; collective."""
        with runtime.seeded(0):  # fresh weights are drawn before they are loaded; no later draw may depend on that
            self.runner = build(self.plan, self.head, latent_size=self.latent_size)

    def status(self) -> dict[str, Any]:
        """Return the tokenizer's digest and the statistics."""
        return {"tokenizer": self.plan.tokenizer.digest, "reward": self.statistics}

    def infer(self, request: Tensors) -> Tensors:
        """Map tokens [B, S], prompt_lengths [B], lengths [B] to raw rewards [B, 1] and latents [B, d], if it has any.

        In the coordinates of the latents, those of SFT responses have mean 0 and covariance I: a latent's norm is its
        Mahalanobis distance.
        """
        rows = {name: request[name] for name in ("tokens", "prompt_lengths", "lengths")}
        read = partial(score_and_latents, how=self.score, latent_size=self.latent_size)
        out = self.runner.infer_rows(rows, read, outputs=1 + self.latent_size)
        result = {"rewards": out[:, :1].contiguous()}
        if self._gaussian is not None:
            centred = out[:, 1:].double() - self._gaussian.mean
            whitened = torch.linalg.solve_triangular(self._gaussian.factor, centred.T, upper=False).T
            result["latents"] = whitened.float().contiguous()
        return result


def read_statistics(plan: Plan, where: str = "model") -> dict[str, Any]:
    """Return a planned reward model's statistics for the status reply, see `RewardModel.statistics`.

    Raises:
        ConfigError: the checkpoint is no trained reward model's, or one whose scores are all equal; the message begins
            with the config key `where`.
    """
    assert plan.manifest is not None
    state = plan.manifest.state
    if missing := [name for name in ("score", "mean", "std") if name not in state]:
        if isinstance(plan.source, HfDirectory):
            raise ConfigError(
                f"{where}: {plan.source.path}/config.json has no {REWARD_KEY}, which standardises scores: add "
                f'"{REWARD_KEY}": {{"mean": ..., "std": ...}} of its scores on held-out pairs, or 0 and 1 for raw '
                "scores"
            )
        raise ConfigError(
            f"{where}: {plan.source} has no {', '.join(missing)}: it is a critic, not a trained reward model"
        )
    if not (std := state["std"]) > 0:
        raise ConfigError(f"{where}: {plan.source} has a standard deviation of {std}: expected above 0")
    return statistics_of(state)


def statistics_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the statistics that the state in a reward model's manifest gives, see `RewardModel.statistics`."""
    return {
        "k": 1,
        "mean": [float(state["mean"])],
        "std": [float(state["std"])],
        "kind": state.get("kind", "bradley_terry"),
        "latent_size": int(state.get("latent_size", 0)),
    }


def score_and_latents(output: Tensor, rows: Rows, how: ScoreReduction, latent_size: int) -> Tensor:
    """Return each response's score and the latents (means) at its last token.

    Args:
        output: [b, S, C] a head's outputs per token: first the score, then `latent_size` latents.
        rows: "prompt_lengths" and "lengths" [b].
        how: see `sequence_score`.

    Returns:
        [b, 1 + latent_size].
    """
    score = sequence_score(output[..., 0], rows["prompt_lengths"], rows["lengths"], how)
    last = output[torch.arange(len(output), device=output.device), rows["lengths"] - 1]
    return torch.cat([score.unsqueeze(1), last[:, 1 : 1 + latent_size]], dim=1)


def store_gaussian(gaussian: Gaussian) -> dict[str, Any]:
    """Convert a Gaussian over latents to fp32 values for a manifest."""
    return {"mean": pack_array(gaussian.mean.cpu().numpy()), "factor": pack_array(gaussian.factor.cpu().numpy())}


def read_gaussian(stored: Mapping[str, Any]) -> Gaussian:
    """Read what `store_gaussian` wrote, as fp64."""
    mean, factor = (torch.from_numpy(unpack_array(stored[name])).double() for name in ("mean", "factor"))
    return Gaussian(mean, factor)


def serve_reward_model(config: RewardServerConfig, run: Run) -> None:
    """Build the reward model and serve until the job is told to stop."""
    if run.rank == 0:
        check_server(config.server)
    model = RewardModel(config.model)
    runtime.initialize(config.model.parallel, seed=0)
    model.build()
    serve(model, ENDPOINTS, config.server, group=runtime.control_group())
    runtime.shutdown()
