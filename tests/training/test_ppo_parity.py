"""The distributed product (Megatron layouts, PyTriton servers) matches the single-process fp64 reference of EPPO."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import free_port, run_ranks
from reference_eppo import ReferenceConfig, State, ppo_step, random_weights

from nemo_eppo.conversion.hf_weights import export_tensors, load_tensors
from nemo_eppo.data.noun_task import write_noun_task
from nemo_eppo.megatron import checkpoint, runtime
from nemo_eppo.megatron.model import Head, build_model
from nemo_eppo.megatron.model_config import ModelConfig
from nemo_eppo.megatron.runner import ModelRunner
from nemo_eppo.megatron.runtime import ParallelConfig
from nemo_eppo.rollout.batch import minibatches, step_seed

SEED, BATCH, MINI_BATCH, EPOCHS = 11, 8, 4, 2
TOLERANCE = 1e-5
REFERENCE = ReferenceConfig(
    num_layers=4,
    score_mean=0.3,
    score_std=0.7,
    missing_eos=0.5,
    eta=40.0,  # energies of random weights differ little: large enough to matter
    kl_coefficient=0.1,
    actor_lr=1e-3,
    critic_lr=1e-3,
    adam_eps=1e-4,  # Adam turns gradients near its epsilon into noise of the size of the learning rate
)
MODEL = ModelConfig(
    num_layers=REFERENCE.num_layers,
    hidden_size=REFERENCE.hidden_size,
    ffn_hidden_size=REFERENCE.intermediate_size,
    num_attention_heads=REFERENCE.num_heads,
    num_query_groups=REFERENCE.num_kv_heads,
    vocab_size=REFERENCE.vocab_size,
    max_sequence_length=48,
)
SFT = random_weights(REFERENCE, seed=1)
SCORER = random_weights(REFERENCE, seed=2, head="score")
JOB = Path(__file__).parent / "parity_job.py"
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
}


def _save_model(directory: Path, head: Head, weights: dict[str, torch.Tensor], tokenizer: Path) -> None:
    runtime.initialize(ParallelConfig(), 1)
    chunks = build_model(MODEL, ParallelConfig(), head=head)
    load_tensors(chunks, MODEL, lambda name: weights[name].float())
    state = {"score": "last", "mean": REFERENCE.score_mean, "std": REFERENCE.score_std} if head == "scalar" else {}
    manifest = checkpoint.Manifest(head=head, step=0, model=MODEL, state=state)
    checkpoint.save(directory, ModelRunner(chunks, 4), manifest, tokenizer)


def _read_model(directory: Path) -> dict[str, torch.Tensor]:
    runtime.initialize(ParallelConfig(), 1)
    chunks = build_model(MODEL, ParallelConfig(), head="scalar")
    checkpoint.load(directory, ModelRunner(chunks, 4))
    return dict(export_tensors(chunks, MODEL))


def _start(kind: str, ranks: int, config: dict[str, Any], directory: Path) -> subprocess.Popen[bytes]:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, default=str))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port"]
    command += [str(free_port()), str(JOB), kind, str(directory / "config.json"), str(directory)]
    with (directory / "log.txt").open("wb") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def _url(process: subprocess.Popen[bytes], directory: Path) -> str:
    ready = directory / "ready.json"
    for _ in range(600):
        if ready.exists():
            return str(json.loads(ready.read_text())["url"])
        assert process.poll() is None, (directory / "log.txt").read_text()[-4000:]
        time.sleep(0.2)
    raise TimeoutError(directory)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, tokenizer and checkpoints of policy and reward model, which is also where the critic starts."""
    root = tmp_path_factory.mktemp("parity")
    sizes = {"sft_examples": 8, "preference_pairs": 8, "prompts": 32, "validation_examples": 4}
    write_noun_task(root / "data", seed=3, **sizes)
    tokenizer = root / "data" / "tokenizer"
    run_ranks(_save_model, 1, root / "sft", "lm", SFT, tokenizer)
    run_ranks(_save_model, 1, root / "rm", "scalar", SCORER, tokenizer)
    return root


@pytest.fixture(scope="module")
def reward_url(work: Path) -> Iterator[str]:
    directory = work / "reward_server"
    config = {"model": {"restore_from_path": work / "rm"}, "server": {"ready_file": directory / "ready.json"}}
    process = _start("reward", 1, config, directory)
    yield _url(process, directory)
    _stop(process)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_steps_match_the_reference(layout: str, work: Path, reward_url: str) -> None:
    parallel, adam = LAYOUTS[layout], {"weight_decay": 0.1, "eps": REFERENCE.adam_eps}
    critic_directory, actor_directory = work / layout / "critic", work / layout / "actor"
    critic = _start(
        "critic",
        2,
        {
            "model": {"restore_from_path": work / "rm", "parallel": parallel, "micro_batch_size": 2},
            "optimizer": {"lr": REFERENCE.critic_lr, **adam},
            "server": {"ready_file": critic_directory / "ready.json"},
        },
        critic_directory,
    )
    try:
        actor = _start(
            "actor",
            2,
            {
                "seed": SEED,
                "model": {"restore_from_path": work / "sft", "parallel": parallel, "micro_batch_size": 2},
                "data": {"train": work / "data" / "prompts.train.jsonl", "max_prompt_length": 16},
                "generation": {"max_new_tokens": 20},
                "ppo": {
                    "max_steps": 3,
                    "rollout_batch_size": BATCH,
                    "mini_batch_size": MINI_BATCH,
                    "epochs": EPOCHS,
                    "energy": {"eta": REFERENCE.eta, "reference": "same_response"},
                    "kl": {"coefficient": REFERENCE.kl_coefficient},
                    "missing_eos": {"penalty": REFERENCE.missing_eos},
                },
                "optimizer": {"lr": REFERENCE.actor_lr, **adam},
                "servers": {
                    "critic": {"url": _url(critic, critic_directory)},
                    "rewards": [{"url": reward_url}],
                },
            },
            actor_directory,
        )
        assert actor.wait(300) == 0, (actor_directory / "log.txt").read_text()[-6000:]
    finally:
        _stop(critic)
    made = torch.load(actor_directory / "steps.pt", weights_only=False)

    state = State(REFERENCE, SFT, SFT, SCORER, SCORER)
    for number, step in enumerate(made["steps"], start=1):
        batch, experience, metrics = step["batch"], step["experience"], step["metrics"]
        updates = [
            rows.tolist()
            for epoch in range(EPOCHS)
            for rows in minibatches(BATCH, MINI_BATCH, step_seed(SEED, number), epoch)
        ]
        expected = ppo_step(state, batch.tokens, batch.prompt_lengths, batch.lengths, batch.truncated, updates)
        mask = expected["mask"]
        assert torch.equal(mask, experience.mask)
        for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
            found = torch.where(mask, getattr(experience, name), 0.0).double()
            torch.testing.assert_close(found, expected[name], rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        for name, found in (("energies", experience.energies), ("ref_energies", experience.ref_energies)):
            torch.testing.assert_close(found[:, 0].double(), expected[name], rtol=0, atol=TOLERANCE)
        for name in ("actor_loss", "critic_loss", "actor_grad_norm", "critic_grad_norm"):
            mean = sum(expected[name]) / len(expected[name])
            assert metrics[name.replace("_", "/", 1)] == pytest.approx(mean, abs=TOLERANCE), name
        assert metrics["seconds/attributed_fraction"] > 0.95
    assert expected["energies"].sub(expected["ref_energies"]).abs().max() > 1e-4  # the penalty was at work
    assert batch.truncated.any()
    assert not batch.truncated.all()

    for found, weights in ((made["policy"], state.policy), (_critic(made["critic"]), state.critic)):
        assert set(found) == set(weights)
        for name, expected_weight in weights.items():
            torch.testing.assert_close(
                found[name].double(),
                expected_weight.detach(),
                rtol=0,
                atol=TOLERANCE,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def _critic(path: str) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = run_ranks(_read_model, 1, Path(path))[0]
    return result
