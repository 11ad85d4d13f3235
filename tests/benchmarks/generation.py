"""Tokens per second of our engine and of transformers on models of the same size, on this machine.

python tests/benchmarks/generation.py [--threads 1 2] [--repeats 3]
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.megatron.model import build_model
from nemo_eppo.megatron.model_config import ModelConfig
from nemo_eppo.megatron.runtime import ParallelConfig, initialize, shutdown
from nemo_eppo.rollout.sampling import SamplingParams

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=1024,
    num_attention_heads=8,
    vocab_size=1024,
    max_sequence_length=512,
)
BATCH, PROMPT, NEW = 16, 32, 128


def tokens_per_second(generate: Callable[[], int]) -> float:
    start = time.perf_counter()
    return generate() / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, the fastest counts")
    arguments = parser.parse_args()
    parallel = ParallelConfig()
    initialize(parallel, seed=1)
    ours = MegatronEngine(
        build_model(MODEL, parallel, head="lm"),
        MODEL,
        eos_id=MODEL.vocab_size - 1,
        pad_id=0,
        max_batch_size=BATCH,
        max_sequence_length=MODEL.max_sequence_length,
    )
    theirs = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=MODEL.num_layers,
            hidden_size=MODEL.hidden_size,
            intermediate_size=MODEL.ffn_hidden_size,
            num_attention_heads=MODEL.num_attention_heads,
            vocab_size=MODEL.vocab_size,
            max_position_embeddings=MODEL.max_sequence_length,
        )
    ).eval()
    prompts = torch.randint(0, MODEL.vocab_size, (BATCH, PROMPT))
    sampling = SamplingParams(max_new_tokens=NEW)

    def run_ours() -> int:
        completions = ours.generate(prompts.tolist(), sampling, list(range(BATCH)))
        return sum(len(completion.token_ids) for completion in completions)

    def run_theirs() -> int:
        settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True, "top_k": 0, "pad_token_id": 0}
        return theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)[:, PROMPT:].numel()

    print(
        f"{BATCH} prompts of {PROMPT} tokens, {NEW} new tokens, {MODEL.num_layers} layers x {MODEL.hidden_size}, fp32"
    )
    print(f"{'threads':>7} {'ours':>10} {'transformers':>13} {'ratio':>6}   (tokens/s, best of {arguments.repeats})")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        rates = [(tokens_per_second(run_ours), tokens_per_second(run_theirs)) for _ in range(arguments.repeats)]
        best_ours, best_theirs = max(ours for ours, _ in rates), max(theirs for _, theirs in rates)
        print(f"{threads:>7} {best_ours:>10.0f} {best_theirs:>13.0f} {best_ours / best_theirs:>6.2f}", flush=True)
    shutdown()


if __name__ == "__main__":
    main()
