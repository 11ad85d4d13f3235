"""Every setting of the jobs that train reward models (conf/gpt_reward_model.yaml) and serve them."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from nemo_eppo.algorithms.choices import KLMode, ScoreReduction
from nemo_eppo.config import Config
from nemo_eppo.settings.model import ModelSetup
from nemo_eppo.settings.run import ExpManagerConfig
from nemo_eppo.settings.servers import ServerConfig
from nemo_eppo.settings.training import CheckpointConfig, FitSettings, OptimizerConfig, TextDataConfig


class OdinConfig(Config):
    """Disentangling reward from length (ODIN, arXiv 2402.07319)."""

    length_weight: float = Field(1.0, ge=0)
    """Weight of |rho(quality, length)| - rho(length head, length); rho: Pearson correlation over the global batch."""
    orthogonality_weight: float = Field(1.0, ge=0)
    """Weight of the absolute cosine of the two heads' weights."""


class InformConfig(Config):
    """The information bottleneck (InfoRM, arXiv 2402.09345)."""

    latent_size: int = Field(128, ge=1)
    """Size d of the latents; the authors' scripts have 512."""
    beta: float = Field(0.1, ge=0)
    """Weight of the latents' KL divergence, summed over both sides of a pair."""
    kl: KLMode = "paper_sum"
    """`paper_sum` sums over d; `official_mean_first` (the authors' code) averages over d first and is far smaller."""
    sft_responses: Path | None = None
    """File of rows {"prompt", "response"} of the SFT model (or its training data), of which the first 2048 are used. A
    Gaussian of their latents is stored with the model. Kind `inform` needs it; null for other kinds."""


class RewardLossConfig(Config):
    """The loss, and how a response gets its score."""

    kind: Literal["bradley_terry", "odin", "inform"] = "bradley_terry"
    """`odin` adds a head that learns length, `inform` an information bottleneck that gives latents."""
    score: ScoreReduction = "last"
    """Which of the head's outputs is a response's score: that at its last token, or the sum or mean over its tokens."""
    margin: float = Field(0.0, ge=0)
    """Margin by which the chosen response's score should exceed the rejected one's; 0 for none."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed probability that a label is wrong; 0 for no smoothing."""
    l2: float = Field(0.0, ge=0)
    """Weight of the squared scores, which keeps scores near zero; 0 for none."""
    odin: OdinConfig = OdinConfig()
    inform: InformConfig = InformConfig()

    @model_validator(mode="after")
    def _inform_is_complete(self) -> "RewardLossConfig":
        if self.kind == "inform" and self.score != "last":
            raise ValueError(f"kind 'inform' with score '{self.score}': expected 'last'")
        if self.kind == "inform" and self.inform.sft_responses is None:
            raise ValueError("kind 'inform' needs inform.sft_responses")
        return self

    def state(self, mean: float, std: float) -> dict[str, Any]:
        """Return the state of a checkpoint's manifest: how the score is read, and its mean and standard deviation."""
        latents = {"latent_size": self.inform.latent_size} if self.kind == "inform" else {}
        return {"kind": self.kind, "score": self.score, "mean": mean, "std": std, **latents}


class EnsembleConfig(Config):
    """Reward models that differ in the order of pairs and, without a linear probe, in their fresh heads. Member i is in
    <run directory>/member_i."""

    members: int = Field(1, ge=1)
    """Number of reward models, trained one after another; 1 for a single one in <run directory>/checkpoints."""
    linear_probe_steps: int = Field(0, ge=0)
    """Steps that train a fresh head on a frozen decoder, from which all members then start (WARM); 0 for none."""
    lrs: tuple[float, ...] = ()
    """Learning rates, given to the members in turn; empty for optimizer.lr in all."""
    dropouts: tuple[float, ...] = (0.0,)
    """Probabilities of dropout in the residual stream, given to the members in turn."""
    average: bool = False
    """WARM (arXiv 2401.12187): average the members' weights, head included, into <run directory>/average."""
    keep_best: int | None = Field(None, ge=2)
    """Number of members that are averaged, those of highest validation accuracy; null for all."""

    @property
    def folders(self) -> list[str]:
        """Where each member's checkpoints are, below the run directory; "." is that itself."""
        if self.members == 1 and not self.linear_probe_steps:
            return ["."]
        return [f"member_{index}" for index in range(self.members)]

    @model_validator(mode="after")
    def _consistent(self) -> "EnsembleConfig":
        if self.average and self.members < 2:
            raise ValueError(f"average = true needs at least 2 members, got {self.members}")
        if self.keep_best is not None and (not self.average or self.keep_best > self.members):
            raise ValueError(
                f"keep_best = {self.keep_best} needs average = true and members >= keep_best, got {self.members}"
            )
        if wrong := [lr for lr in self.lrs if lr <= 0]:
            raise ValueError(f"lrs: {wrong[0]}; expected numbers above 0")
        if wrong := [dropout for dropout in self.dropouts if not 0 <= dropout < 1]:
            raise ValueError(f"dropouts: {wrong[0]}; expected numbers from 0 to below 1")
        if not self.dropouts:
            raise ValueError("dropouts: empty; expected at least one number")
        return self


class RewardTrainingConfig(Config):
    """The reward-model training job (conf/gpt_reward_model.yaml)."""

    exp_manager: ExpManagerConfig = ExpManagerConfig()
    seed: int = Field(1234, ge=0, lt=2**31)
    """Seed of the head's fresh weights and of the order of pairs."""
    model: ModelSetup
    """Usually the SFT model; it gets a fresh head."""
    data: TextDataConfig
    """Files of rows {"prompt", "chosen", "rejected"}."""
    reward: RewardLossConfig = RewardLossConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    """Several reward models, trained with one command."""
    fit: FitSettings
    checkpoint: CheckpointConfig = CheckpointConfig()
    optimizer: OptimizerConfig


class RewardServerConfig(Config):
    """The reward job (conf/serve_reward_model.yaml)."""

    exp_manager: ExpManagerConfig = ExpManagerConfig()
    model: ModelSetup
    """A checkpoint of train_reward_model.py, or a Hugging Face *ForSequenceClassification directory with one output and
    with "nemo_eppo_reward": {"mean", "std"} in its config.json."""
    server: ServerConfig = ServerConfig()
