"""How the CPU time of generation, a log-prob pass and an update grows: exponents of power laws, fitted over doublings.

Each should be at most 1, linear. Over sequence length attention's own share grows quadratically, so there 1.1 is only
looked at below the lengths where it dominates. Samples of a prompt are rows like any others to the engine.
"""

import math
from collections.abc import Sequence
from functools import partial
from statistics import linear_regression

import torch
from networks import even_rows, mean_nll, our_runner, shape
from pairs import Contestant, Options, Row, interleave

from nemo_eppo.generation.engine import Limits
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.settings.generation import SamplingParams

BASE = {"batch": 16, "sequence": 128, "vocabulary": 1024, "layers": 4, "samples": 1}
SIZES = {
    "batch": (16, 32, 64, 128),
    "sequence": (128, 256, 512, 1024),
    "vocabulary": (1024, 4096, 16384, 32768),
    "layers": (2, 4, 8, 16),
    "samples": (1, 2, 4, 8),
}
LIMIT = 1.1


def measure(options: Options) -> list[Row]:
    rows: list[Row] = []
    for dimension, all_sizes in SIZES.items():
        sizes = all_sizes[:2] if options.smallest else all_sizes
        # what -> size -> its work
        works: dict[str, dict[str, Contestant]] = {}
        for size in sizes:
            scale = BASE | {dimension: size}
            if options.smallest:
                scale |= {"batch": max(1, scale["batch"] // 8), "sequence": scale["sequence"] // 8}
            for what, work in contestants(**scale).items():
                if dimension != "samples" or what == "generate":
                    works.setdefault(what, {})[str(size)] = work
        for what, by_size in works.items():
            seconds = interleave(by_size, options.rounds)
            times = [min(one.cpu for one in seconds[str(size)]) for size in sizes]
            exponent = slope(sizes, times)
            last = math.log(times[-1] / times[-2]) / math.log(sizes[-1] / sizes[-2])
            verdict = f"above {LIMIT}" if max(exponent, last) > LIMIT else ""
            if verdict and dimension == "sequence":
                verdict += ", attention's share excepted"
            rows.append(
                {"what": what, "over": f"{dimension} {sizes[0]} to {sizes[-1]}"}
                | {"exponent": exponent, "of the last doubling": last, "smallest s": times[0], "largest s": times[-1]}
                | {"verdict": verdict}
            )
    return rows


def slope(sizes: Sequence[int], times: Sequence[float]) -> float:
    return linear_regression([math.log(size) for size in sizes], [math.log(time) for time in times]).slope


def contestants(batch: int, sequence: int, vocabulary: int, layers: int, samples: int) -> dict[str, Contestant]:
    """A quarter of each sequence is its prompt, the rest is generated."""
    model = shape(layers=layers, width=128, vocabulary=vocabulary, window=sequence)
    runner = our_runner(model, 16, trained=True)
    rows = even_rows(batch, sequence, vocabulary)
    prompt = sequence // 4
    limits = Limits(eos_id=0, pad_id=0, max_batch_size=1024, max_sequence_length=sequence)
    engine = MegatronEngine(runner.chunks, limits)
    new = sequence - prompt
    sampling = SamplingParams(max_new_tokens=new, min_new_tokens=new)
    prompts = [row for row in torch.randint(1, vocabulary, (batch, prompt)).tolist() for _ in range(samples)]
    return {
        "generate": partial(engine.generate, prompts, sampling, list(range(len(prompts)))),
        "log-probs": partial(runner.infer, *rows.values(), outputs=2),
        "update": partial(runner.train_step, rows, mean_nll),
    }
