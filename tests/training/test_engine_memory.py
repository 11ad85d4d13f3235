"""A whole actor job beside a TensorRT-LLM engine on one GPU: an account of its memory never passes the budget.

The stand-in of TensorRT-LLM and the trainer keep the account together. The sizes are those of the actor's and the
engine's real tensors; activations, and what loading a checkpoint takes, are given.
"""

import logging
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from jobs import Models
from torch import Tensor

from nemo_eppo.config import load_config
from nemo_eppo.generation import ipc
from nemo_eppo.megatron import checkpoint, device
from nemo_eppo.megatron.model import unwrap
from nemo_eppo.megatron.offload import Offload
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.observability.run import Run
from nemo_eppo.rollout.batch import Completion
from nemo_eppo.settings.ppo import PPOConfig
from nemo_eppo.settings.run import ExpManagerConfig
from nemo_eppo.training import ppo_job, setup
from nemo_eppo.training.policy import Policy
from nemo_eppo.training.ppo_loop import train_ppo

STAND_IN = Path(__file__).parents[1] / "generation" / "stand_in"
sys.path.append(str(STAND_IN))
from memory_account import Account  # noqa: E402

# In sizes of the weights. The trainer's weights, gradients and moments take 4, and so do the critic's in its turns; the
# engine's weights 1, a refit 1. Activations take all the rest, so that an engine that wakes wants what torch keeps.
BUDGET, ACTIVATIONS, LOADING, CACHE_SHARE = 10, 6, 2, 0.9


class Trainer:
    """The actor's GPU memory as torch holds it: what is freed stays reserved until its cache is emptied."""

    def __init__(self, account: Account, weights: int) -> None:
        self._account, self._weights, self._reserved = account, weights, 0
        self._runner: ModelRunner | None = None
        self._buffers: list[weakref.ref[Tensor]] = []

    def watch(self) -> None:
        """Follow what the job does from now on."""
        build, allocate, load = setup.build, ipc.allocate, checkpoint.load
        train_step, infer = ModelRunner.train_step, ModelRunner.infer

        def watched_build(*arguments: Any, **settings: Any) -> ModelRunner:
            runner = build(*arguments, **settings)
            self._runner = runner
            self._use()
            return runner

        def watched_allocate(*arguments: Any) -> Tensor:
            buffer = allocate(*arguments)
            self._buffers.append(weakref.ref(buffer))
            self._use()
            return buffer

        def working(work: Any, size: int) -> Any:
            def watched(*arguments: Any, **settings: Any) -> Any:
                self._use(size)
                result = work(*arguments, **settings)
                self._use()
                return result

            return watched

        turn = Offload.turn

        @contextmanager
        def watched_turn(offload: Offload) -> Iterator[None]:
            outermost = not offload._in_turn
            with turn(offload):
                self._account.hold("critic", _states(getattr(offload._model, "runner", None)))
                yield
                self._account.hold("critic", _states(offload._model.runner))
            if outermost:
                self._account.hold("critic", 0)

        Offload.turn = watched_turn  # type: ignore[assignment, method-assign]
        vars(ppo_job)["build"], vars(ipc)["allocate"] = watched_build, watched_allocate
        checkpoint.load = working(load, LOADING * self._weights)
        for name, work in (("train_step", train_step), ("infer", infer)):
            setattr(ModelRunner, name, working(work, ACTIVATIONS * self._weights))
        device.empty_cache = self._empty_cache

    def _live(self) -> int:
        buffers = [buffer for reference in self._buffers if (buffer := reference()) is not None]
        return _states(self._runner) + sum(buffer.nbytes for buffer in buffers)

    def _use(self, work: int = 0) -> None:
        self._reserved = max(self._reserved, self._live() + work)
        self._account.hold("trainer", self._reserved)

    def _empty_cache(self) -> None:
        self._reserved = self._live()
        self._account.hold("trainer", self._reserved)


def _states(runner: ModelRunner | None) -> int:
    """Bytes of weights, gradients and moments."""
    if runner is None:
        return 0
    held = [p for chunk in runner.chunks for p in unwrap(chunk).parameters()]
    held += [buffer.grad_data for chunk in runner.chunks for buffer in chunk.buffers]
    for part in runner.optimizer.chained_optimizers:
        held += [value for state in part.optimizer.state.values() for value in state.values() if value.dim()]
    return sum(tensor.nbytes for tensor in held)


def train(values: dict[str, Any], directory: Path, weights: int, mistake: str | None) -> dict[str, int]:
    """Run the job on a GPU that has room for BUDGET `weights`, with a critic for 4 more; return what is held when
    it answers for the last time."""
    account = Account(directory / "account", weights * (BUDGET + 4 * (values["critic"] is not None)))
    Trainer(account, weights).watch()
    if mistake == "torch keeps its cache":
        device.empty_cache = lambda: None
    elif mistake == "moments appear with the first update":
        vars(ppo_job)["allocate_state"] = lambda optimizer: None
    (directory / "run").mkdir(exist_ok=True)
    values["engine"]["tensorrt_llm"]["environment"]["STAND_IN_MEMORY"] = str(directory / "account")
    generate, held = Policy.generate, dict[str, int]()

    def watched(policy: Policy, *arguments: Any) -> list[Completion]:
        held.update(account.held())
        return generate(policy, *arguments)

    Policy.generate = watched  # type: ignore[assignment, method-assign]
    run = Run(directory / "run", 0, logging.getLogger(), ExpManagerConfig())
    train_ppo(load_config(PPOConfig, values), run)
    (directory / "account").rename(directory / f"account_{values['ppo']['max_steps']}")
    return held


def settings(models: Models, steps: int) -> dict[str, Any]:
    engine = {"free_gpu_memory_fraction": CACHE_SHARE, "environment": {"PYTHONPATH": str(STAND_IN)}}
    return {
        "model": {"restore_from_path": models.sft},
        "data": {
            "train": models.data / "prompts.train.jsonl",
            "validation": models.data / "prompts.validation.jsonl",
            "max_prompt_length": 16,
        },
        "generation": {"max_new_tokens": 8},
        "engine": {"name": "tensorrt_llm", "tensorrt_llm": engine},
        "ppo": {
            "max_steps": steps,
            "rollout_batch_size": 4,
            "samples_per_prompt": 2,
            "mini_batch_size": 8,
            "advantages": {"estimator": "remax"},
        },
        "rewards": [{"function": "nemo_eppo.tools.noun_task:gold_reward"}],
        "shaping": {"energy_penalty": {"eta": 1.0}},
        "critic": None,
        "optimizer": {"lr": 1e-4},
        "validation": {"interval": 1, "max_prompts": 4},
        "checkpoint": {"interval": 1},
    }


def weights(models: Models) -> int:
    return sum(tensor.numel() * 4 for tensor in models.policy.values())


def test_trainer_and_engine_take_turns_with_the_gpus_memory_also_when_a_run_resumes(
    models: Models, tmp_path: Path
) -> None:
    for steps in (2, 3):
        held = run_ranks(train, 1, settings(models, steps), tmp_path, weights(models), None)[0]
        assert held["trainer"] == pytest.approx(weights(models) * 4, rel=0.02)
        assert held["kv_cache"] == pytest.approx(weights(models) * 4.5, rel=0.02), "as large as it may be"


def test_so_does_a_critic_in_the_same_processes(models: Models, tmp_path: Path) -> None:
    values = settings(models, 2)
    values["critic"] = {"colocated": {"restore_from_path": models.rm, "optimizer": {"lr": 1e-4}}}
    values["ppo"]["advantages"] = {}
    held = run_ranks(train, 1, values, tmp_path, weights(models), None)[0]
    assert "critic" not in held


@pytest.mark.slow  # of the account itself
@pytest.mark.parametrize("mistake", ["torch keeps its cache", "moments appear with the first update"])
def test_the_account_finds_what_passes_the_budget(models: Models, tmp_path: Path, mistake: str) -> None:
    with pytest.raises(RuntimeError, match=r"MemoryError: \d+ bytes of \d+ when "):
        run_ranks(train, 1, settings(models, 2), tmp_path, weights(models), mistake)
