"""Tiny Hugging Face models with random weights, saved by transformers, for the tests of conversion and scoring."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from nemo_eppo.data.tokenizer import word_level

WORDS = [f"w{n}" for n in range(59)]  # with <eos> and <pad> 61 tokens: tensor parallelism has to pad
VOCABULARY = 67  # more than the tokenizer's, as in Qwen
_SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "attn_implementation": "eager",
    "tie_word_embeddings": False,
}
_STRETCHED = {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 0.1, "high_freq_factor": 2.0, **_STRETCHED}
YARN = {"rope_type": "yarn", "beta_fast": 2.0, "beta_slow": 0.05, **_STRETCHED}
LINEAR = {"rope_type": "linear", "factor": 2.5}
WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
FAMILIES: dict[str, Any] = {
    "Llama": LlamaConfig(**_SETTINGS),
    "DeepSeek": LlamaConfig(**_SETTINGS | {"num_key_value_heads": 4, "rope_theta": 5e4}),  # no grouped queries
    "Llama3.1": LlamaConfig(**_SETTINGS | {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "Mistral": MistralConfig(**_SETTINGS | {"sliding_window": None}),
    "Mistral7B": MistralConfig(**_SETTINGS | {"sliding_window": 4, "rope_scaling": LINEAR}),
    "Qwen2": Qwen2Config(**_SETTINGS | {"tie_word_embeddings": True}),
    "Qwen3": Qwen3Config(**_SETTINGS | {"head_dim": 12, "rope_scaling": YARN, **WINDOWS}),
    "Gemma2": Gemma2Config(
        **_SETTINGS
        | {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 4, "tie_word_embeddings": True}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    ),
    "Phi3": Phi3Config(**_SETTINGS | {"sliding_window": 5}),
}


def random_model(family: str, *, scores: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A transformers model all of whose parameters matter; with `scores` outputs in place of a language-model head."""
    config = copy.deepcopy(FAMILIES[family])
    torch.manual_seed(3)
    if scores:
        config.num_labels = scores
        network = AutoModelForSequenceClassification.from_config(config)
    else:
        network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            centre = 1.0 if "norm" in name and family != "Gemma2" else 0.0
            parameter.normal_(centre, 0.3 if parameter.dim() == 1 else 0.15)
    return network.to(dtype).eval()


def save(network: Any, directory: Path, max_shard_size: str = "20KB") -> Path:
    """As transformers would, in several shards, with a tokenizer beside."""
    network.save_pretrained(directory, max_shard_size=max_shard_size)
    word_level(WORDS, directory)
    return directory


def ids(text: str) -> list[int]:
    """Token ids of some of WORDS."""
    return [2 + WORDS.index(word) for word in text.split()]


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def batch() -> tuple[Tensor, Tensor]:
    """tokens [4, 10] and lengths [4], unequal."""
    draw = torch.Generator().manual_seed(7)
    return torch.randint(2, 61, (4, 10), generator=draw), torch.tensor([10, 4, 7, 9])


@torch.no_grad()
def transformers_logits(network: Any) -> list[Tensor]:
    """Logits [length, V] of each row of `batch`, without padding."""
    tokens, lengths = batch()
    return [network(row[None, :length]).logits[0] for row, length in zip(tokens, lengths.tolist(), strict=True)]


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_tensors(got: Path, expected: Path) -> None:
    ours, theirs = tensors_of(got), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
