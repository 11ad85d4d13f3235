"""Settings of `nemo-eppo prepare`; docstrings of fields are the help of its options."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from nemo_eppo.config import Config


class PreparationConfig(Config):
    """How a corpus becomes training files."""

    tokenizer: Path | None = None
    """Use this Hugging Face tokenizer directory."""
    vocab_size: int = 8192
    """Train a byte-level BPE tokenizer of this size on the training rows if none is given."""
    chat_template: Path | Literal["tokenizer"] | None = None
    """Format prompts and responses with this Jinja file, or with the tokenizer's own template; the written tokenizer
    keeps it."""
    system_prompt: str | None = None
    """System turn for conversations that have none; a prefix if there is no template."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Hold out this share of the prompts; a hash of the prompt (of its first human turn) decides which, whatever the
    order or number of the sources."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Drop examples with a longer prompt, BOS included."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Drop examples with a longer response, EOS included; of a pair, the longer one counts."""
    keep: tuple[str, ...] = ()
    """Carry these fields of the rows, which every usable row must have, into the prompts files, for reward functions. A
    prompt that comes again with other values is another prompt."""
    strict: bool = False
    """Stop at the first unusable row instead of dropping it."""

    @field_validator("keep")
    @classmethod
    def _are_fields(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        if "" in keep or "prompt" in keep or len(set(keep)) < len(keep):
            raise ValueError("expected names of fields, each once and none 'prompt'")
        return keep


class NounTaskConfig(Config):
    """What is generated of the noun task."""

    seed: int = 0
    """Seed that the task is generated from."""
    sft_examples: int = Field(20_000, ge=1)
    """Number of demonstrations."""
    preference_pairs: int = Field(16_000, ge=1)
    """Number of labelled pairs."""
    prompts: int = Field(12_000, ge=1)
    """Number of prompts for PPO."""
    validation_examples: int = Field(512, ge=1)
    """Number of examples in each validation file."""
    hedge_bias: float = 0.5
    """Share of the preference labels that favours hedges."""
