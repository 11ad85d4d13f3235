"""What a GPU would make the host wait for, or has no memory for."""

from typing import Any

import torch
from distributed import run_ranks
from small_models import build_engine, build_policy, random_prompts, tokens_of, trainer_reads
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_eppo.generation.decoder import Decoder
from nemo_eppo.megatron import device
from nemo_eppo.rollout.batch import Completion
from nemo_eppo.settings.generation import SamplingParams

PROMPTS = random_prompts([7, 1, 4, 12, 4, 9])


class NoWaiting(TorchFunctionMode):
    """Refuses lists as indices of numbers on the device, for which the host waits on a GPU."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        indexed = function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
        if indexed and arguments[0].is_floating_point():  # whole numbers are on the host, some of them
            index = arguments[1] if isinstance(arguments[1], tuple) else (arguments[1],)
            assert not any(isinstance(part, list) for part in index), index
        return function(*arguments, **(named or {}))


def decode_without_waiting() -> list[Completion]:
    chunks = build_policy({})
    sampling = SamplingParams(max_new_tokens=20, temperature=2.0, min_new_tokens=3)
    engine = build_engine(chunks, max_batch_size=len(PROMPTS))
    with NoWaiting():
        completions = engine.generate(PROMPTS, sampling, list(range(len(PROMPTS))))
        trainer_reads(chunks, PROMPTS, completions, sampling)
    return completions


def test_nothing_is_indexed_by_lists() -> None:
    assert min(map(len, tokens_of(run_ranks(decode_without_waiting, 1)[0]))) >= 3


def move_rows() -> tuple[int, int, bool]:
    decoder = Decoder(build_policy({}))
    decoder.start(64)
    decoder.add(torch.tensor(random_prompts([50] * 8)), torch.full((8,), 50), [])
    [layers], largest = decoder._cache.chunks, 0
    before, places = [layer.clone() for layer in layers], {layer.data_ptr() for layer in layers}

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            nonlocal largest
            out = function(*arguments, **(named or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in places:
                largest = max(largest, out.numel())
            return out

    with Sizes():
        order = decoder.keep([1, 4, 6, 7])
    pairs = zip(decoder._cache.chunks[0], before, strict=True)
    kept = all(torch.equal(layer[:4, ..., :50, :], old[order, ..., :50, :]) for layer, old in pairs)
    return largest, before[0][0].numel(), kept


def test_rows_move_within_the_cache_without_a_copy_beside_it() -> None:
    largest, row, kept = run_ranks(move_rows, 1)[0]
    assert kept
    assert largest < row


def give_back() -> list[str]:
    said: list[str] = []
    device.empty_cache = lambda: said.append("empty")
    engine = build_engine(build_policy({}))
    engine.generate(PROMPTS[:2], SamplingParams(max_new_tokens=4), [1, 2])
    engine.sleep()
    return said


def test_sleep_gives_the_caches_memory_back() -> None:
    assert run_ranks(give_back, 1) == [["empty"]]
