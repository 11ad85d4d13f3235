"""The disk cache of the reference's answers: warm it costs nothing, torn it heals, and no change finds old entries."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from jobs import Models

from nemo_eppo.config import ConfigError, load_config
from nemo_eppo.generation.engine import EngineLimits
from nemo_eppo.generation.megatron_engine import MegatronEngine
from nemo_eppo.megatron import runtime
from nemo_eppo.megatron.frozen import FrozenWeights
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.rollout.batch import Completion, FinishReason, RolloutBatch
from nemo_eppo.settings.generation import SamplingParams
from nemo_eppo.settings.model import ModelSetup, ParallelConfig
from nemo_eppo.settings.ppo import EnergyConfig, PPOConfig
from nemo_eppo.training.energy_cache import EnergyCache, energy_cache, prompt_digest
from nemo_eppo.training.policy import Policy
from nemo_eppo.training.setup import build, plan

KEY = {"model": "a", "energy": {"preset": "paper"}}
PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10, 11]]


@dataclass
class Counted:
    """Calls of a process."""

    generate: int = 0
    infer: int = 0


def energies(
    models: Models, directory: Path, rows: list[int], parallel: dict[str, Any]
) -> tuple[torch.Tensor, Counted]:
    """Reference energies of the prompts at `rows` in a fresh process, and the passes that they cost."""
    setup = ModelSetup(restore_from_path=models.sft, parallel=ParallelConfig(**parallel))
    planned, config = plan(setup), EnergyConfig()
    runtime.initialize(setup.parallel, 1)
    runner, counted = build(planned, "lm", probe=config), Counted()
    engine = MegatronEngine(runner.chunks, EngineLimits(eos_id=1, pad_id=0, max_batch_size=8, max_sequence_length=24))
    generate, infer = engine.generate, runner.infer

    def count_generate(*args: Any) -> list[Completion]:
        counted.generate += 1
        return generate(*args)

    def count_infer(*args: Any, **kwargs: Any) -> Any:
        counted.infer += 1
        return infer(*args, **kwargs)

    engine.generate, runner.infer = count_generate, count_infer  # type: ignore[method-assign,assignment]
    assert isinstance(runner, ModelRunner)
    own_answers = SamplingParams(max_new_tokens=8, greedy=True)
    policy = Policy(
        runner, planned.model, FrozenWeights(runner.chunks), engine, config, own_answers, EnergyCache(directory, KEY)
    )
    completions = [Completion([2, 1], torch.zeros(2), FinishReason.STOP, 0) for _ in rows]
    batch = RolloutBatch.from_completions([PROMPTS[row] for row in rows], completions, 0)
    prompts = [PROMPTS[row] for row in rows]
    found = policy.infer_reference(batch, prompts, logprobs=True, energies=True).energies
    assert found is not None
    return found, counted


REFERENCE_LOGPROBS = 1  # the pass over the policy's responses, which PPO needs anyway


def test_a_warm_cache_costs_no_generation_and_no_forward_pass(models: Models, tmp_path: Path) -> None:
    cold, first = run_ranks(energies, 1, models, tmp_path, [0, 1], {})[0]
    warm, second = run_ranks(energies, 1, models, tmp_path, [1, 0, 1], {})[0]
    more, third = run_ranks(energies, 1, models, tmp_path, [0, 1, 2], {})[0]
    assert (first.generate, first.infer) == (1, REFERENCE_LOGPROBS + 1)
    assert (second.generate, second.infer) == (0, REFERENCE_LOGPROBS)
    assert (third.generate, third.infer) == (1, REFERENCE_LOGPROBS + 1)
    assert torch.equal(warm, cold[[1, 0, 1]])
    assert torch.equal(more[:2], cold)
    files = list(EnergyCache(tmp_path, KEY).directory.glob("*.jsonl"))
    assert sorted(len(path.read_text().splitlines()) for path in files) == [1, 2]  # the warm run wrote nothing


def test_all_ranks_share_what_rank_0_reads_and_writes(models: Models, tmp_path: Path) -> None:
    cold = run_ranks(energies, 2, models, tmp_path, [0, 1, 2], {})
    warm = run_ranks(energies, 2, models, tmp_path, [0, 1, 2], {})
    for rank in range(2):
        assert warm[rank][1].generate == 0
        assert torch.equal(warm[rank][0], cold[0][0])
    assert len(list(EnergyCache(tmp_path, KEY).directory.glob("*.jsonl"))) == 1


@pytest.mark.parametrize("kept", [0.99, 0.6, 0.51])
def test_a_torn_last_record_is_not_read_and_written_again(kept: float, tmp_path: Path) -> None:
    rows = [([1, 2], [5, 6, 7], [0.1, -0.2]), ([3], [8], [1 / 3, 1e-20])]
    EnergyCache(tmp_path, KEY).append(rows)
    (file,) = EnergyCache(tmp_path, KEY).directory.glob("*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    cache = EnergyCache(tmp_path, KEY)
    assert cache.load() == {prompt_digest([1, 2]): [0.1, -0.2]}
    cache.append(rows[1:])
    assert EnergyCache(tmp_path, KEY).load() == {prompt_digest(p): e for p, _, e in rows}  # to the last bit


def test_a_reader_gets_what_another_job_has_added_and_nothing_twice(tmp_path: Path) -> None:
    reader, writer = EnergyCache(tmp_path, KEY), EnergyCache(tmp_path, KEY)
    assert reader.load() == {}
    reader.append([([9], [9], [9.0])])
    writer.append([([1], [2], [0.5])])
    assert reader.load() == {prompt_digest([1]): [0.5]}  # not its own
    (file,) = set(reader.directory.glob("*.jsonl")) - {reader._file}
    whole = file.read_bytes()
    torn = whole.replace(prompt_digest([1]).hex().encode(), prompt_digest([3]).hex().encode())
    with file.open("ab") as appending:
        appending.write(torn[:-9])
        appending.flush()
        assert reader.load() == {}
        appending.write(torn[-9:])
    assert reader.load() == {prompt_digest([3]): [0.5]}
    assert reader.load() == {}
    writer.append([([5], [2], [0.25])])
    assert reader.load() == {prompt_digest([5]): [0.25]}
    with file.open("ab") as appending:
        appending.write(b"{}\n")
    assert reader.load() == {}  # a crash may have torn it
    writer.append([([7], [2], [0.125])])
    with pytest.raises(ConfigError, match=f"{file.name}, line 4 is damaged"):
        reader.load()


def test_the_keys_of_others_are_told_by_what_differs(tmp_path: Path) -> None:
    EnergyCache(tmp_path, {"model": "b", "energy": {"preset": "down_proj"}}).append([([1], [2], [0.5])])
    EnergyCache(tmp_path, KEY).append([([1], [2], [0.5])])
    [differences] = EnergyCache(tmp_path, KEY).others().values()
    assert differences == ["energy.preset = 'down_proj', here 'paper'", "model = 'b', here 'a'"]


def test_a_damaged_record_in_the_middle_is_named(tmp_path: Path) -> None:
    EnergyCache(tmp_path, KEY).append([([1], [2], [0.5]), ([3], [4], [0.5])])
    (file,) = EnergyCache(tmp_path, KEY).directory.glob("*.jsonl")
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    with pytest.raises(ConfigError, match=f"{file.name}, line 1 is damaged"):
        EnergyCache(tmp_path, KEY).load()
    EnergyCache(tmp_path, KEY).directory.joinpath(file.name).write_text('{"prompt": "", "prompt": ""}\n{}\n')
    with pytest.raises(ConfigError, match=rf"{file.name}, line 1 is damaged \(field 'prompt' occurs more than once\)"):
        EnergyCache(tmp_path, KEY).load()


@pytest.mark.parametrize(
    "changes",
    [
        {"energy": {"norm": False}},
        {"energy": {"preset": "down_proj"}},
        {"energy": {"layers": [0]}},
        {"energy": {"window": "generating"}},
        {"energy": {"max_tokens": 5}},
        {"generation": {"max_new_tokens": 19}},
        {"model": {"precision": "bf16"}},
    ],
)
def test_every_setting_that_matters_is_in_the_key(changes: dict[str, Any], models: Models, tmp_path: Path) -> None:
    base = directory_of(models, tmp_path, {})
    assert directory_of(models, tmp_path, {"shaping": {"energy_penalty": {"eta": 3.5}}}) == base
    assert directory_of(models, tmp_path, changes) != base


def test_another_model_is_in_the_key(models: Models, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(models.sft, copy)
    base = directory_of(models, tmp_path, {})
    assert directory_of(models, tmp_path, {"model": {"restore_from_path": copy}}) == base
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["step"] = 7
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert directory_of(models, tmp_path, {"model": {"restore_from_path": copy}}) != base


def directory_of(models: Models, tmp_path: Path, changes: dict[str, Any]) -> Path:
    values: dict[str, Any] = {
        "model": {"restore_from_path": models.sft},
        "data": {"train": models.data / "prompts.train.jsonl", "max_prompt_length": 16},
        "generation": {"max_new_tokens": 20},
        "ppo": {"max_steps": 1, "rollout_batch_size": 8, "mini_batch_size": 8},
        "shaping": {"energy_penalty": {"eta": 2.0}},
        "optimizer": {"lr": 1e-6},
    }
    for section, extra in changes.items():
        values[section] = values.get(section, {}) | extra
    config = load_config(PPOConfig, values)
    cache = energy_cache(plan(config.model), config, tmp_path)
    assert cache is not None
    return cache.directory
