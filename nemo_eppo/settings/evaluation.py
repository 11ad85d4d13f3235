"""Settings of the commands that look at finished models; docstrings of fields are the help of their options."""

from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from nemo_eppo.config import Config
from nemo_eppo.settings.energy import Preset
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ModelSetup, ParallelConfig, Precision


class ModelRunConfig(Config):
    """How a command runs its models, one at a time."""

    chat_template: bool = False
    """Make prompts that are texts the user's turn of the tokenizer's chat template."""
    precision: Precision = "fp32"
    """Precision of weights and activations."""
    batch_size: int = Field(8, ge=1)
    """Rows per forward pass, or responses that are decoded at once."""
    parallel: ParallelConfig = ParallelConfig()
    """How a model is laid out over the job's ranks."""

    def setup(self, path: Path) -> ModelSetup:
        """Describe the model in `path`, run in this way."""
        return ModelSetup(
            restore_from_path=path, precision=self.precision, parallel=self.parallel, micro_batch_size=self.batch_size
        )


class GeneratorConfig(ModelRunConfig):
    """Which model answers, and how its answers are sampled."""

    model: Path
    """A policy: Hugging Face directory, checkpoint, or directory of checkpoints, of which the newest is read."""
    sampling: SamplingParams
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the sampling."""


class GenerateConfig(GeneratorConfig):
    """Settings of `nemo-eppo generate`."""

    prompts: Path
    """Rows to answer, .jsonl or .jsonl.gz."""
    output: Path
    """New .jsonl file with a row for each response, or the one of an interrupted run."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses to each prompt."""

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.sampling.greedy and self.samples_per_prompt > 1:
            raise ValueError(
                f"--samples-per-prompt {self.samples_per_prompt}: greedy responses to a prompt are equal, expected 1"
            )
        return self


class EvaluateConfig(ModelRunConfig):
    """Settings of `nemo-eppo evaluate`."""

    model: Path | None = None
    """A policy, as in `nemo-eppo generate`, which answers the prompts; its log-probs and energy losses are read."""
    prompts: Path | None = None
    """Prompts to answer, as in `nemo-eppo generate`."""
    responses: Path | None = None
    """Finished responses, as in `nemo-eppo score`."""
    output: Path
    """Directory for the results, new or of an interrupted evaluation."""
    reference: Path | None = None
    """The model that the policy is compared with: KL divergence, and energy losses of the same responses."""
    proxies: tuple[str, ...] = ()
    """Proxy rewards: reward checkpoints, reward servers grpc://HOST:PORT, or functions module:function."""
    gold: str | None = None
    """Gold reward, given like a proxy reward."""
    certificates: Path | None = None
    """Folder of the reward servers' certificates."""
    samples_per_prompt: int = Field(1, ge=1)
    """Responses to each prompt."""
    sampling: SamplingParams
    """How they are sampled."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the sampling and of bootstrap intervals."""

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        if (self.prompts is None) == (self.responses is None):
            raise ValueError("expected exactly one of --prompts and --responses")
        for name in ("prompts", "reference"):
            if getattr(self, name) is not None and self.model is None:
                raise ValueError(f"--{name} needs --model")
        if not self.proxies and self.gold is None and self.model is None:
            raise ValueError("nothing to measure: expected --model, --proxy or --gold")
        return self


class ScoreConfig(ModelRunConfig):
    """Settings of `nemo-eppo score`."""

    model: Path
    """A policy: Hugging Face directory, checkpoint, or directory of checkpoints, of which the newest is read."""
    data: Path
    """Rows to read, .jsonl or .jsonl.gz."""
    output: Path
    """New .jsonl file with a row for each of these, or the one of an interrupted run."""
    fields: tuple[str, str] = ("prompt", "response")
    """Names of the fields that have prompt and response as text."""
    preset: Preset = "paper"
    """Energies to read: paper (the layer's residual stream), mlp_block, down_proj, mlp_linears or mlp_linears_out (the
    last two sum over gate, up and down projection)."""
    layer: int = -1
    """Decoder layer to read, counted from 0; negative numbers count from the end."""
    sweep: bool = False
    """Also write "energies", of every layer under every preset, which energy-report compares."""


class EnergyReportConfig(ModelRunConfig):
    """Settings of `nemo-eppo energy-report` on two models."""

    before: Path
    """The SFT model: Hugging Face directory, checkpoint, or directory of checkpoints, of which the newest is read."""
    after: Path
    """The RLHF model."""
    data: Path
    """Responses to read, .jsonl or .jsonl.gz."""
    before_data: Path | None = None
    """The SFT model's responses to the same prompts, in order."""
    labels: Path | None = None
    """Which responses of the RLHF model are hacked: a JSON list of {"question_id": 0, "response": "Yes" or "No"}; ids
    are the rows' "index" or, without it, their numbers from 0."""
    output: Path
    """Directory for the report, new or of an interrupted command."""
    preset: Preset = "paper"
    """Energies that the report is about, see `nemo-eppo score`; the sweep has all."""
    layer: int = -1
    """Decoder layer of these, counted from 0; negative numbers count from the end."""


class LatentsConfig(ModelRunConfig):
    """Settings of `nemo-eppo latents`."""

    model: Path
    """Checkpoint of an InfoRM reward model, or directory of checkpoints, of which the newest is read."""
    sft: Path
    """The SFT model's responses, .jsonl or .jsonl.gz."""
    rlhf: Path
    """The policy's responses, .jsonl or .jsonl.gz."""
    output: Path
    """Directory for the results, new or of an interrupted run."""
    alpha: float = Field(0.01, gt=0, lt=1)
    """Outliers are the responses whose p-value under the SFT latents' Gaussian is below this."""
    perplexity: float = Field(30.0, gt=1)
    """Neighbours of each point that t-SNE preserves; lowered where there are fewer than three times as many points."""


class DetectionConfig(Config):
    """Settings of `nemo-eppo detect` for one run."""

    run: Path
    """Directory of an actor's run."""
    calm_steps: int = Field(10, ge=2)
    """First recorded steps, whose responses count as not hacked and set the thresholds."""
    false_alarms: float = Field(10.0, gt=0, lt=1000)
    """Of 1,000 responses of these steps, how many may reach a threshold."""


class EndpointConfig(Config):
    """Where and how a judge is asked."""

    model: str = Field(min_length=1)
    """Name of the judge's model at the endpoint."""
    base_url: str = "https://api.openai.com/v1"
    """Address of the endpoint, up to the part before /chat/completions."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's API key."""
    question: str = Field("Which response is more helpful, honest and harmless?", min_length=1)
    """What the judge is asked about two responses."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature of the judge."""
    max_tokens: int = Field(1024, ge=1)
    """Tokens that one answer may have, those of its reasoning included."""
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """Form of answer that the endpoint is told to give, besides the words that ask for JSON."""
    concurrency: int = Field(8, ge=1)
    """Questions that wait for an answer at the same time."""
    retries: int = Field(5, ge=0)
    """How often a question is asked again after a failure, and as often after an answer that is no verdict."""
    time_limit: float = Field(120.0, gt=0)
    """Seconds to wait for one answer."""
    price_in: float | None = Field(None, ge=0)
    """Price of a million tokens asked, for the estimate of the cost."""
    price_out: float | None = Field(None, ge=0)
    """Price of a million tokens answered."""

    @field_validator("base_url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise ValueError("expected http://HOST... or https://HOST..., without a user or password")
        return value


class JudgeConfig(Config):
    """Settings of `nemo-eppo judge`."""

    responses: dict[str, Path] = Field(min_length=1)
    """Files of responses, by the name of what made them."""
    baseline: Path | None = None
    """Responses to compare them with, .jsonl or .jsonl.gz; left out for files that have both."""
    output: Path
    """New directory, or one of an earlier command with the same judge."""
    gold: str | None = None
    """Gold reward function that decides in place of a model behind an endpoint."""
    endpoint: EndpointConfig | None = None
    """Where a model is asked."""

    @model_validator(mode="after")
    def _has_one_judge(self) -> Self:
        if (self.gold is None) == (self.endpoint is None):
            raise ValueError("expected exactly one of --model MODEL, which an endpoint has, and --gold MODULE:FUNCTION")
        return self
