"""Seconds of an update with padded and with packed micro-batches, on rows whose lengths differ as in real dialogues."""

from functools import partial

import torch
from networks import our_runner, rows_of, shape, thousandth_nll
from pairs import Contestant, Options, Row, compare, interleave

MICRO_BATCH = 8


def measure(options: Options) -> list[Row]:
    model, count = shape(window=1024), 16 if options.smallest else 64
    found: list[Row] = []
    for mean in (24,) if options.smallest else (24, 200):
        # log-normal with sigma 0.8
        lengths = torch.exp(torch.randn(count) * 0.8).mul(mean / 1.38).long().clamp(2, model.max_sequence_length)
        rows = rows_of(lengths, model.vocab_size)
        longest = lengths.sort(descending=True).values.split(MICRO_BATCH)
        padded = sum(MICRO_BATCH * int(part[0]) for part in longest)
        budget = padded * MICRO_BATCH // count  # as many micro-batches, of the mean padded size
        contestants: dict[str, Contestant] = {}
        for name, tokens in (("padded", None), ("packed", budget)):
            runner = our_runner(model, MICRO_BATCH, trained=True, micro_batch_tokens=tokens)
            contestants[name] = partial(runner.train_step, rows, thousandth_nll)
        waste = 1 - int(lengths.sum()) / padded
        seconds = interleave(contestants, options.rounds)
        found += compare(seconds, "padded", **{"mean length": mean, "padding": waste})
    return found
