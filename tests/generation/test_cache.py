"""The cache has memory for the sequences that there are, and no response shows how it came to it."""

import weakref
from typing import Any

import pytest
import torch
from distributed import run_ranks
from small_models import EOS, GEMMA2_MODEL, LAYOUTS, MODEL, PAD, build_policy, random_prompts, tokenizer
from tape import Recorder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_eppo.generation import cache
from nemo_eppo.generation.cache import KeyValueCache
from nemo_eppo.generation.decoder import Decoder
from nemo_eppo.generation.engine import EngineLimits
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.megatron import device
from nemo_eppo.rollout.batch import Completion
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ModelConfig

ENERGY = EnergyProbeConfig(preset="mlp_linears", layers=(-1, 0))
PROMPTS = random_prompts([7, 1, 4, 12, 4, 9, 3, 20, 5, 5, 6, 2])
HOT = SamplingParams(max_new_tokens=40, temperature=2.0)  # responses end at many lengths
AT_ONCE = 3


def test_room_is_for_half_as_many_columns_again_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_MIN_GROWTH", 4)
    room = KeyValueCache([2, 1], 2, 3, torch.float32)
    room.start(100)
    moves = [(columns, room.chunks[1][0].size(3)) for columns in range(1, 101) if room.make_room(5, columns)]
    assert moves == [(1, 5), (6, 10), (11, 16), (17, 25), (26, 39), (40, 60), (61, 91), (92, 100)]
    assert {layer.shape for layers in room.chunks for layer in layers} == {(5, 2, 2, 100, 3)}
    room.start(7)
    assert sum(layer.numel() for layers in room.chunks for layer in layers) == 0
    assert room.make_room(1, 7)
    assert room.chunks[0][0].shape == (1, 2, 2, 7, 3)


@pytest.mark.parametrize(("rows", "columns", "shape"), [(2, 500, (2, 750)), (6, 20, (6, 138)), (9, 139, (9, 267))])
def test_layers_move_one_by_one_with_what_their_rows_hold(rows: int, columns: int, shape: tuple[int, int]) -> None:
    room = KeyValueCache([3, 2], 2, 4, torch.float32)
    room.start(1000)
    room.make_room(4, 10)
    before = [layer.normal_().clone() for layers in room.chunks for layer in layers]
    old = [weakref.ref(layer) for layers in room.chunks for layer in layers]
    alive = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
            if "new_zeros" in str(function):
                alive.append(sum(layer() is not None for layer in old))
            return function(*arguments, **(named or {}))

    with Allocations():
        assert room.make_room(rows, columns)
    assert alive == [5, 4, 3, 2, 1]
    kept = min(rows, 4)
    for layer, held in zip((layer for layers in room.chunks for layer in layers), before, strict=True):
        assert (layer.size(0), layer.size(3)) == shape
        assert torch.equal(layer[:kept, :, :, :138], held[:kept])
        assert layer.count_nonzero() == held[:kept].count_nonzero()
    assert not room.make_room(rows - 1, columns)


def room_while_sequences_grow() -> list[tuple[int, int]]:
    cache._MIN_GROWTH = 2
    decoder = Decoder(build_policy({}))
    decoder.start(64)
    decoder.add(torch.tensor(random_prompts([10] * 8)), torch.full((8,), 10), [])
    shapes = []
    for step in range(30):
        if step == 10:
            decoder.keep([2, 5])
        decoder.step(torch.zeros(2 if step >= 10 else 8, dtype=torch.int64))
        shapes.append((decoder._cache.chunks[0][0].size(0), decoder._cache.chunks[0][0].size(3)))
    return list(dict.fromkeys(shapes))


def test_the_longest_living_row_decides_not_the_limit() -> None:
    assert run_ranks(room_while_sequences_grow, 1)[0] == [(8, 15), (8, 24), (2, 37), (2, 57)]


def generate(
    layout: dict[str, Any], model: ModelConfig, whole: bool
) -> tuple[list[Completion], list[list[tuple[int, int]]]]:
    """Responses, and the rows and columns of each lane's cache whenever it moved; `whole` is for all that may come."""
    cache._MIN_GROWTH, device.cached_tokens_multiple = 2, lambda: 4
    moves: dict[KeyValueCache, list[tuple[int, int]]] = {}
    make_room = KeyValueCache.make_room

    def watched(self: KeyValueCache, rows: int, columns: int) -> bool:
        moved = make_room(self, *((AT_ONCE, self._limit) if whole else (rows, columns)))
        if moved:
            moves.setdefault(self, []).append((self.chunks[0][0].size(0), self.chunks[0][0].size(3)))
        return moved

    KeyValueCache.make_room = watched  # type: ignore[method-assign]
    limits = EngineLimits(EOS, PAD, AT_ONCE, model.max_sequence_length, tokenizer())
    engine = MegatronEngine(build_policy(layout, model), limits, ENERGY)
    return engine.generate(PROMPTS, HOT, list(range(len(PROMPTS)))), list(moves.values())


@pytest.mark.parametrize(("layout", "model"), [("one rank", GEMMA2_MODEL), ("virtual PP 2x2", MODEL)])
def test_responses_are_bit_for_bit_those_of_a_cache_that_never_moves(layout: str, model: ModelConfig) -> None:
    """And under pipeline parallelism each lane's cache moves on its own."""
    ranks = 1 if layout == "one rank" else 2
    growing, staying = (run_ranks(generate, ranks, LAYOUTS[layout], model, whole) for whole in (False, True))
    for (made, moves), (expected, once) in zip(growing, staying, strict=True):
        assert [len(lane) for lane in once] == [1] * ranks
        assert len(moves) == ranks
        assert all(len({columns for _, columns in lane}) > 1 for lane in moves)
        for one, other in zip(made, expected, strict=True):
            assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
            for name in ("logprobs", "entropies", "energies"):
                assert torch.equal(getattr(one, name), getattr(other, name))


def step_before_and_after_a_move() -> tuple[list[Tensor], list[Tensor], int]:
    """Logits of steps that are run and of the same steps, some of which are replayed; the number of those."""
    cache._MIN_GROWTH, device.cached_tokens_multiple = 2, lambda: 8
    chunks, made, recorder = build_policy({}), [], Recorder()
    tokens = torch.tensor([prompt + [PAD] * (9 - len(prompt)) for prompt in random_prompts([9, 3])])
    for record in (None, recorder):
        decoder, logits = Decoder(chunks, record=record), []
        decoder.start(60)
        decoder.add(tokens, torch.tensor([9, 3]), [])
        for step in range(14):
            if step == 10:  # of 19 and 13 tokens
                decoder.keep([1])
            found = decoder.step(torch.arange(step, step + (1 if step >= 10 else 2))).logits
            assert found is not None
            logits.append(found)
        made.append(logits)
    return made[0], made[1], recorder.replayed


def test_a_recording_made_before_a_move_is_not_replayed_after_it() -> None:
    """The shorter row goes back to the 16 columns of which there were recordings before."""
    [(run, replayed, times)] = run_ranks(step_before_and_after_a_move, 1)
    torch.testing.assert_close(replayed, run, atol=5e-6, rtol=1e-5)
    assert times > 3
