"""How the CPU time of generation, a log-prob pass and an update grows: exponents of power laws, fitted over doublings.

`expected` is the exponent of the FLOPs of products and attention (nemo_eppo/launch/work.py), fitted over the same
sizes: 1 over rows, less where only a part of the work grows, more over the sequence, where attention's share is
quadratic. What is more than 0.1 above it is named. Samples of a prompt are rows like any others to the engine. Over
ranks, which share the same work, the sum of their CPU times should not grow: its exponent should be 0.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import linear_regression

import torch
from distributed import run_ranks
from megatron.core import parallel_state
from networks import ONE, even_rows, mean_nll, our_runner, shape
from pairs import Contestant, Options, Row, interleave

from nemo_eppo.generation.engine import EngineLimits
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.launch.work import Shape
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ModelConfig, ParallelConfig

BASE = {"batch": 8, "sequence": 128, "vocabulary": 1024, "layers": 2, "samples": 1}
SIZES = {
    "batch": (8, 16, 32, 64),
    "sequence": (128, 256, 512, 1024),
    "vocabulary": (1024, 4096, 16384),
    "layers": (2, 4, 8),
    "samples": (1, 2, 4, 8),
}
RANKS = (1, 2, 4)
LAYOUTS: dict[str, Callable[[int], ParallelConfig]] = {
    "DP": lambda ranks: ParallelConfig(),
    "TP": lambda ranks: ParallelConfig(tensor_model_parallel_size=ranks),
}
PROMPT = 4
SLACK = 0.1


def measure(options: Options) -> list[Row]:
    rows = _over_ranks(options)  # first: ranks are forked, which no thread of a measurement survives
    for dimension, all_sizes in SIZES.items():
        sizes = all_sizes[:2] if options.smallest else all_sizes
        # what -> size -> its work
        works: dict[str, dict[str, Contestant]] = {}
        for size in sizes:
            for what, work in contestants(ONE, **_scale(options, **{dimension: size})).items():
                if dimension != "samples" or what == "generate":
                    works.setdefault(what, {})[str(size)] = work
        for what, by_size in works.items():
            seconds = interleave(by_size, options.rounds)
            times = [min(one.cpu for one in seconds[str(size)]) for size in sizes]
            expected = [flops(**_scale(options, **{dimension: size}))[what] for size in sizes]
            rows.append(_row(what, dimension, sizes, times, expected))
    return rows


def _over_ranks(options: Options) -> list[Row]:
    ranks = RANKS[:2] if options.smallest else RANKS
    rows = []
    for name, layout in LAYOUTS.items():
        found = [run_ranks(_of_a_rank, size, options, layout(size)) for size in ranks]
        for what in found[0][0]:
            times = [sum(rank[what] for rank in every) for every in found]
            rows.append(_row(what, f"ranks, {name}", ranks, times, [1.0] * len(ranks)))
    return rows


def _of_a_rank(options: Options, parallel: ParallelConfig) -> dict[str, float]:
    """Least CPU seconds that this rank takes for its share of the base's work, at 64 rows."""
    works = contestants(parallel, **_scale(options, batch=64))
    return {what: min(one.cpu for one in times) for what, times in interleave(works, options.rounds).items()}


def _scale(options: Options, **changes: int) -> dict[str, int]:
    scale = BASE | changes
    if options.smallest:
        scale |= {"batch": scale["batch"] // 4, "sequence": scale["sequence"] // 8}
    return scale


def _row(what: str, over: str, sizes: Sequence[int], times: Sequence[float], work: Sequence[float]) -> Row:
    """Exponents of `times` beside those of `work`, numbers to which the times should be proportional."""
    exponent, expected = slope(sizes, times), slope(sizes, work)
    last, last_expected = slope(sizes[-2:], times[-2:]), slope(sizes[-2:], work[-2:])
    above = max(exponent - expected, last - last_expected) > SLACK
    return {
        "what": what,
        "over": f"{over} {sizes[0]} to {sizes[-1]}",
        "exponent": exponent,
        "expected": expected,
        "of the last doubling": last,
        "expected of it": last_expected,
        "smallest s": times[0],
        "largest s": times[-1],
        "verdict": f"more than {SLACK:g} above" if above else "",
    }


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    return linear_regression([math.log(size) for size in sizes], [math.log(value) for value in values]).slope


def network(sequence: int, vocabulary: int, layers: int) -> ModelConfig:
    return shape(layers=layers, width=128, vocabulary=vocabulary, window=sequence)


def flops(*, batch: int, sequence: int, vocabulary: int, layers: int, samples: int) -> dict[str, float]:
    """FLOPs of products and attention of each of `contestants`."""
    model = Shape(network(sequence, vocabulary, layers), ONE, "fp32", language=True)
    prompt, rows = sequence // PROMPT, batch * samples
    new = sequence - prompt
    forward = model.forward(batch, sequence, sequence - 1)
    works = {
        "generate": model.prefill(rows, prompt) + model.decode(rows, prompt + new / 2) * new,
        "log-probs": forward,
        "update": forward + model.backward(batch, sequence, sequence - 1),
    }
    return {what: work.products + work.attention for what, work in works.items()}


def contestants(
    parallel: ParallelConfig, *, batch: int, sequence: int, vocabulary: int, layers: int, samples: int
) -> dict[str, Contestant]:
    """1 / PROMPT of each sequence is its prompt, the rest is generated."""
    model = network(sequence, vocabulary, layers)
    runner = our_runner(model, 16, trained=True, parallel=parallel)
    rows = even_rows(batch, sequence, vocabulary)
    prompt = sequence // PROMPT
    limits = EngineLimits(eos_id=0, pad_id=0, max_batch_size=1024, max_sequence_length=sequence)
    engine = MegatronEngine(runner.chunks, limits)
    new = sequence - prompt
    sampling = SamplingParams(max_new_tokens=new, min_new_tokens=new)
    prompts = [row for row in torch.randint(1, vocabulary, (batch, prompt)).tolist() for _ in range(samples)]
    mine = prompts[parallel_state.get_data_parallel_rank() :: parallel_state.get_data_parallel_world_size()]
    return {
        "generate": partial(engine.generate, mine, sampling, list(range(len(mine)))),
        "log-probs": partial(runner.infer, *rows.values(), outputs=2),
        "update": partial(runner.train_step, rows, mean_nll),
    }
