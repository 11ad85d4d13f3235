"""Small policies with the same weights in every layout, and slow but obvious ways to decode and to score with them."""

from functools import cache
from typing import Any

import features
import tiny
import tokenizers
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.generation.engine import Engine, EngineLimits
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.generation.stops import Stops
from nemo_eppo.megatron.energy import EnergyProbe
from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.model import build_model, set_distribution, unwrap
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.megatron.runtime import initialize
from nemo_eppo.megatron.weights import load_tensors
from nemo_eppo.rollout.batch import Completion
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ModelConfig, ParallelConfig, Precision

MODEL = tiny.MODEL.model_copy(update={"vocab_size": 61})  # odd, so that tensor parallelism pads it
QWEN2 = MODEL.model_copy(update={"qkv_bias": True, "rotary_base": 1e6})
QWEN3 = MODEL.model_copy(update={**features.QWEN3, "head_dim": 12, "tie_embeddings": True})
GEMMA2_MODEL = MODEL.model_copy(update=features.GEMMA2)
PHI3_MODEL = MODEL.model_copy(update=features.PHI3)
MISTRAL_MODEL = MODEL.model_copy(update=features.MISTRAL)
EOS, PAD, END = 2, 0, 1
LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP 2": {"tensor_model_parallel_size": 2},
    "SP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP 2": {"pipeline_model_parallel_size": 2},
    "virtual PP 2x2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "TP 2 PP 2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}


@cache
def hf_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each id of MODEL, most of them short texts, so that a stop string can have many tokenisations."""
    syllables = [consonant + rest for consonant in "bcdfgkl" for rest in ("", "a", "ab", "e", "i", " o", "u")]
    texts = ["<pad>", "<end>", "<eos>", *syllables, "a", "e", "m", "ma", "n", "no", "p", " ", "z"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({text: index for index, text in enumerate(texts)}, []))
    backend.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", additional_special_tokens=["<end>"]
    )


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(hf_tokenizer(), "small_models")


def random_weights(model: ModelConfig) -> dict[str, Tensor]:
    """Whole tensors under Hugging Face names, of a size that gives each prompt a few likely tokens."""
    return tiny.random_weights(model, outputs=0, seed=11, scale=0.2)


def build_policy(layout: dict[str, Any], model: ModelConfig = MODEL, precision: Precision = "fp32") -> list[Any]:
    """A policy with `random_weights`, in a process that `run_ranks` started."""
    parallel = ParallelConfig(**layout)
    initialize(parallel, seed=1)
    chunks: list[Any] = build_model(model, parallel, head="lm", precision=precision)
    load_tensors(chunks, model, random_weights(model).__getitem__)
    return chunks


def build_engine(
    chunks: list[Any], model: ModelConfig = MODEL, energy: EnergyProbeConfig | None = None, **changes: Any
) -> Engine:
    settings = {"eos_id": EOS, "pad_id": PAD, "max_batch_size": 8, "max_sequence_length": model.max_sequence_length}
    return MegatronEngine(chunks, EngineLimits(**(settings | {"tokenizer": tokenizer()} | changes)), energy)


def random_prompts(lengths: list[int], seed: int = 3) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, MODEL.vocab_size, (length,), generator=draw).tolist() for length in lengths]


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def greedy_without_cache(chunks: list[Any], model: ModelConfig, prompt: list[int], steps: int) -> list[int]:
    """The likeliest token after each of `steps` whole forward passes of the model; EOS is a token like others."""
    runner, ranks = ModelRunner(chunks, micro_batch_size=1), unwrap(chunks[0]).tp_group
    copies = len(chunks) * unwrap(chunks[0]).pp_group.size()  # an interleaved pipeline wants several micro-batches
    tokens = list(prompt)
    for _ in range(steps):
        rows = torch.tensor([tokens] * copies)
        lengths = torch.full((copies,), len(tokens))
        width = model.padded_vocab_size(ranks.size()) // ranks.size()
        logits = runner.infer(rows, lengths, outputs=width)[0][0, -1].contiguous()
        shards = [torch.empty_like(logits) for _ in range(ranks.size())]
        dist.all_gather(shards, logits, group=ranks)
        tokens.append(int(torch.cat(shards)[: model.vocab_size].argmax()))
    return tokens[len(prompt) :]


def trainer_reads(
    chunks: list[Any],
    prompts: list[list[int]],
    completions: list[Completion],
    sampling: SamplingParams,
    micro_batch_tokens: int | None = None,
    probe: EnergyProbe | None = None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the trainer computes of each response, from padded or from packed rows: log-probs [n] and entropies [n] of
    its tokens, and energies [n + 1, E] from the prompt's last token on."""
    rows = [prompt + completion.token_ids for prompt, completion in zip(prompts, completions, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.tensor([row + [PAD] * (int(lengths.max()) - len(row)) for row in rows])
    targets = torch.full_like(tokens, IGNORE)
    for row, prompt, length in zip(range(len(rows)), prompts, lengths.tolist(), strict=True):
        targets[row, len(prompt) - 1 : length - 1] = tokens[row, len(prompt) : length]
    set_distribution(chunks, sampling.distribution(Stops(sampling.stop_strings, EOS, tokenizer()).ids))
    runner = ModelRunner(chunks, micro_batch_size=2, micro_batch_tokens=micro_batch_tokens, probe=probe)
    numbers, energies = runner.infer(tokens, lengths, targets, outputs=2, energies=probe is not None)
    if energies is None:
        energies = torch.zeros(*tokens.shape, 0)
    logprobs, entropies = numbers.unbind(-1)
    drawn = targets != IGNORE
    return [
        (logprobs[row][drawn[row]], entropies[row][drawn[row]], energies[row, len(prompt) - 1 : length])
        for row, (prompt, length) in enumerate(zip(prompts, lengths.tolist(), strict=True))
    ]
