"""Steps that are replayed give what steps give that are run; a tape stands in for the CUDA graphs of a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from distributed import run_ranks
from small_models import (
    EOS,
    GEMMA2_MODEL,
    LAYOUTS,
    MODEL,
    PAD,
    QWEN3,
    build_policy,
    random_prompts,
    tokenizer,
)
from tape import Recorder
from torch import Tensor

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.generation.build import check_engine
from nemo_eppo.generation.engine import EngineLimits
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.generation.replay import GraphRecorder, ReplayedSteps
from nemo_eppo.megatron import device
from nemo_eppo.megatron.lora import AdaptersOff, adapters, attach
from nemo_eppo.rollout.batch import Completion
from nemo_eppo.settings.energy import EnergyProbeConfig
from nemo_eppo.settings.generation import EngineConfig, SamplingParams
from nemo_eppo.settings.model import LoRAConfig, ModelConfig, ParallelConfig

ENERGY = EnergyProbeConfig(preset="mlp_linears", layers=(-1, 0))
PROMPTS = random_prompts([7, 1, 4, 12, 4, 9, 3, 20, 5, 5, 6, 2, 15, 8, 10, 11, 3, 7, 2, 6])
SEEDS = list(range(len(PROMPTS)))
HOT = SamplingParams(max_new_tokens=24, temperature=2.0)  # responses end at many lengths
PENALISED = SamplingParams(max_new_tokens=28, temperature=1.5, repetition_penalty=1.3, top_p=0.9, min_new_tokens=5)


def engines(chunks: list[Any], model: ModelConfig, at_once: int) -> tuple[MegatronEngine, MegatronEngine, Recorder]:
    limits = EngineLimits(EOS, PAD, at_once, model.max_sequence_length, tokenizer())
    recorder = Recorder()
    return MegatronEngine(chunks, limits, ENERGY), MegatronEngine(chunks, limits, ENERGY, recorder), recorder


def generate_both(layout: dict[str, Any], model: ModelConfig, at_once: int) -> tuple[Any, Any, int, int]:
    device.cached_tokens_multiple = lambda: 16  # as on a GPU, where it is larger
    run, replayed, recorder = engines(build_policy(layout, model), model, at_once)
    made = []
    for engine in (run, replayed):
        made.append([engine.generate(PROMPTS, sampling, SEEDS) for sampling in (HOT, PENALISED)])
        engine.sleep()
    return made[0], made[1], recorder.recorded, recorder.replayed


def assert_same(made: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(made, expected, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        for name in ("logprobs", "entropies", "energies"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("layout", "model", "at_once"),
    [
        ("one rank", MODEL, 3),
        ("one rank", GEMMA2_MODEL, 12),
        ("TP 2", QWEN3, 20),
        ("virtual PP 2x2", MODEL, 12),
    ],
)
def test_responses_are_the_same(layout: str, model: ModelConfig, at_once: int) -> None:
    ranks = 1 if layout == "one rank" else 2
    for run, replayed, recorded, times in run_ranks(generate_both, ranks, LAYOUTS[layout], model, at_once):
        for made, expected in zip(replayed, run, strict=True):
            assert_same(made, expected)
        assert times > 4 * recorded > 0


def generate_with_adapters() -> tuple[Any, Any, int]:
    chunks = build_policy({})
    attach(chunks, LoRAConfig(rank=4, alpha=64))
    for adapter in adapters(chunks):
        for parameter in adapter.parameters():
            parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    run, replayed, recorder = engines(chunks, MODEL, 8)
    made = []
    for engine in (run, replayed):
        adapted = engine.generate(PROMPTS, HOT, SEEDS)
        with AdaptersOff(chunks).active():
            made.append((adapted, engine.generate(PROMPTS, HOT, SEEDS)))
    return made[0], made[1], recorder.replayed


def test_adapters_are_on_or_off_as_they_are_now() -> None:
    [(run, replayed, times)] = run_ranks(generate_with_adapters, 1)
    assert [c.token_ids for c in run[0]] != [c.token_ids for c in run[1]]
    for made, expected in zip(replayed, run, strict=True):
        assert_same(made, expected)
    assert times > 10


class Made(NamedTuple):
    """What a step gives."""

    twice: Tensor
    place: Tensor


def test_free_rows_are_at_the_start_and_outputs_are_ones_own() -> None:
    seen = []

    def advance(longest: int, *inputs: Tensor) -> Made:
        tokens, positions = inputs
        seen.append((positions.tolist(), longest))
        return Made(2 * tokens.float(), 1.0 * positions)

    recorder = Recorder()
    steps = ReplayedSteps(advance, 11, recorder)
    outputs: list[tuple[Made, Tensor]] = []
    for used in (11, 10, 3, 3, 3, 11, 11, 9):
        tokens = torch.arange(used) + len(outputs)
        outputs.append((steps(64, tokens, tokens + 50), tokens))
    for made, tokens in outputs:  # looked at when all are done
        torch.testing.assert_close(made, Made(2.0 * tokens, tokens + 50.0))
    assert (recorder.recorded, recorder.replayed) == (2, 6)
    assert [len(positions) for positions, _ in seen] == [11, 11, 8, 8]
    assert seen[1] == ([51 + row for row in range(10)] + [0], 64)
    assert seen[2][0][3:] == [0] * 5
    with pytest.raises(RuntimeError, match="waits for the device"):
        recorder(lambda: print(float(torch.ones(1))))


def stand_in_graphs(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """In place of torch.cuda's graphs what they do with memory: a pool whose graphs are all gone is refused for ever.
    Returns the number of graphs in each pool."""
    users: dict[int, int] = {}

    class CUDAGraph:
        number: int

        def __del__(self) -> None:
            users[self.pool()] -= 1

        def pool(self) -> int:
            return self.number

        def replay(self) -> None:
            pass

    @contextmanager
    def capture(graph: Any, pool: int | None, capture_error_mode: str) -> Iterator[None]:
        graph.number = len(users) if pool is None else pool
        assert users.setdefault(graph.number, 1) > 0, "INTERNAL ASSERT FAILED"
        users[graph.number] += pool is not None
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return users


def test_graphs_share_memory_until_all_of_them_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    users, record = stand_in_graphs(monkeypatch), GraphRecorder()
    for rollout in range(3):
        recordings = [record(lambda: None) for _ in range(4)]
        del recordings[0]
        recordings.append(record(lambda: None))
        assert users == {**dict.fromkeys(range(rollout), 0), rollout: 4}
        recordings.clear()


def generate_after_updates() -> tuple[list[Completion], list[Completion]]:
    """Weights change in place between two rollouts, as updates and the reference's turn change them."""
    chunks = build_policy({})
    run, replayed, _ = engines(chunks, MODEL, 8)
    replayed.generate(PROMPTS, HOT, SEEDS)
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.mul_(0.9)
    return replayed.generate(PROMPTS, HOT, SEEDS), run.generate(PROMPTS, HOT, SEEDS)


def test_new_weights_are_used() -> None:
    [(replayed, run)] = run_ranks(generate_after_updates, 1)
    assert_same(replayed, run)


def test_where_it_cannot_work_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="cuda_graphs = true: there is no GPU here"):
        check_engine(EngineConfig(cuda_graphs=True), MODEL, ParallelConfig(), HOT)
    with pytest.raises(ConfigError, match="cuda_graphs = true is for name = 'megatron'"):
        load_config(EngineConfig, {"name": "tensorrt_llm", "cuda_graphs": True})
