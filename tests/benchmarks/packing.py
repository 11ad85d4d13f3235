"""Seconds of an update with padded and with packed micro-batches, on rows whose lengths differ as in real dialogues.

python tests/benchmarks/packing.py [--threads 1] [--repeats 3] [--rows 64]
"""

import argparse
import time

import torch
from torch import Tensor

from nemo_eppo.megatron.logprobs import IGNORE
from nemo_eppo.megatron.model import build_model
from nemo_eppo.megatron.optimizer import build_optimizer, wrap_data_parallel
from nemo_eppo.megatron.runner import ModelRunner, Rows
from nemo_eppo.megatron.runtime import initialize, shutdown
from nemo_eppo.settings.model import ModelConfig, ParallelConfig
from nemo_eppo.settings.training import OptimizerConfig

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=1024,
    num_attention_heads=8,
    vocab_size=1024,
    max_sequence_length=1024,
)
MICRO_BATCH = 8


def loss(output: Tensor, rows: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    value = -output[..., 0].sum() / 1000
    return value, {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, the fastest counts")
    parser.add_argument("--rows", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    initialize(ParallelConfig(), seed=1)
    chunks = wrap_data_parallel(build_model(MODEL, ParallelConfig(), head="lm"), OptimizerConfig(lr=1e-6), "fp32")
    optimizer, scheduler = build_optimizer(chunks, OptimizerConfig(lr=1e-6), "fp32", total_steps=1000)
    print(f"{arguments.rows} rows, {MODEL.num_layers} layers x {MODEL.hidden_size}, fp32, best of {arguments.repeats}")
    print(f"{'mean length':>11} {'padding':>8} {'padded':>9} {'packed':>9} {'ratio':>6}")
    for mean in (24, 200):
        rows = random_rows(arguments.rows, mean)
        longest_first = rows["lengths"].sort(descending=True).values
        padded_tokens = sum(MICRO_BATCH * int(part[0]) for part in longest_first.split(MICRO_BATCH))
        budget = padded_tokens * MICRO_BATCH // arguments.rows  # as many micro-batches, of the mean padded size
        best = []
        for tokens in (None, budget):
            runner = ModelRunner(
                chunks, MICRO_BATCH, micro_batch_tokens=tokens, optimizer=optimizer, scheduler=scheduler
            )
            best.append(min(seconds(runner, rows) for _ in range(arguments.repeats)))
        waste = 1 - int(rows["lengths"].sum()) / padded_tokens
        print(f"{mean:>11} {waste:>8.0%} {best[0]:>7.2f} s {best[1]:>7.2f} s {best[0] / best[1]:>6.2f}", flush=True)
    shutdown()


def random_rows(rows: int, mean: int) -> Rows:
    """Log-normal lengths, sigma 0.8, cut at the model's window."""
    lengths = torch.exp(torch.randn(rows) * 0.8).mul(mean / 1.38).long().clamp(2, MODEL.max_sequence_length)
    tokens = torch.randint(0, MODEL.vocab_size, (rows, int(lengths.max())))
    targets = torch.where(torch.arange(tokens.size(1)) < lengths[:, None] - 1, tokens.roll(-1, 1), IGNORE)
    return {"tokens": tokens, "lengths": lengths, "targets": targets}


def seconds(runner: ModelRunner, rows: Rows) -> float:
    start = time.perf_counter()
    runner.train_step(rows, loss)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
