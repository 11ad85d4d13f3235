"""Tokens per second of our engine and of transformers on models of the same size, on this machine.

`even`: one batch, every response as long as it may be. `mixed`: several batches, prompts and responses of all lengths.

python tests/benchmarks/generation.py [--threads 1 2] [--repeats 3]
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_eppo.generation.engine import Limits
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.megatron.model import build_model
from nemo_eppo.megatron.runtime import initialize, shutdown
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ModelConfig, ParallelConfig

VOCABULARY = {"even": 1024, "mixed": 128}  # a fresh model ends a response with probability 1 / vocabulary
BATCH, PROMPT, NEW, MIXED = 16, 32, 128, 96


def tokens_per_second(generate: Callable[[], int]) -> float:
    start = time.perf_counter()
    return generate() / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, the fastest counts")
    arguments = parser.parse_args()
    initialize(ParallelConfig(), seed=1)
    print(f"batches of {BATCH}, up to {NEW} new tokens, fp32; tokens/s, best of {arguments.repeats}")
    print(f"{'case':>5} {'threads':>7} {'ours':>10} {'transformers':>13} {'ratio':>6}")
    for case in VOCABULARY:
        run_ours, run_theirs = engines(case)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            rates = [(tokens_per_second(run_ours), tokens_per_second(run_theirs)) for _ in range(arguments.repeats)]
            ours, theirs = max(ours for ours, _ in rates), max(theirs for _, theirs in rates)
            print(f"{case:>5} {threads:>7} {ours:>10.0f} {theirs:>13.0f} {ours / theirs:>6.2f}", flush=True)
    shutdown()


def engines(case: str) -> tuple[Callable[[], int], Callable[[], int]]:
    """Both at the same work; each returns how many tokens it generated."""
    model = ModelConfig(
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=1024,
        num_attention_heads=8,
        vocab_size=VOCABULARY[case],
        max_sequence_length=512,
    )
    eos = model.vocab_size - 1
    ours = MegatronEngine(
        build_model(model, ParallelConfig(), head="lm"),
        Limits(eos_id=eos, pad_id=0, max_batch_size=BATCH, max_sequence_length=model.max_sequence_length),
    )
    theirs = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=model.num_layers,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_sequence_length,
            eos_token_id=eos,
        )
    ).eval()
    draw = torch.Generator().manual_seed(0)
    lengths = [PROMPT] * BATCH if case == "even" else torch.randint(8, 64, (MIXED,), generator=draw).tolist()
    prompts = [torch.randint(1, eos, (length,), generator=draw).tolist() for length in lengths]
    fewest = NEW if case == "even" else 1

    def run_ours() -> int:
        completions = ours.generate(prompts, SamplingParams(max_new_tokens=NEW), list(range(len(prompts))))
        return sum(len(completion.token_ids) for completion in completions)

    def run_theirs() -> int:
        settings = {"max_new_tokens": NEW, "min_new_tokens": fewest, "do_sample": True, "top_k": 0, "pad_token_id": 0}
        count = 0
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            longest = max(map(len, batch))
            tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
            out = theirs.generate(tokens, attention_mask=(tokens != 0).long(), **settings)[:, longest:]
            ended = (out == eos).cumsum(1)
            count += int((ended - (out == eos).long() == 0).sum())
        return count

    return run_ours, run_theirs


if __name__ == "__main__":
    main()
