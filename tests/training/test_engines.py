"""A PPO step with either engine; and what becomes of one whose engine has other weights than the trainer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import free_port
from jobs import Job, Models

from nemo_eppo.algorithms.policy import truncated_importance_weights
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.rollout.batch import Completion, FinishReason, RolloutBatch
from nemo_eppo.tools.noun_task import NOUNS
from nemo_eppo.training.ppo import EngineMismatchError, engine_mismatch

PENALTY = 0.25
STOPPING: dict[str, Any] = {"stop_strings": [*NOUNS[:5], f"{NOUNS[6]} "], "repetition_penalty": 1.4}
STAND_IN = Path(__file__).parents[1] / "generation" / "stand_in"


def trtllm(**environment: str) -> dict[str, Any]:
    return {"name": "tensorrt_llm", "tensorrt_llm": {"environment": {"PYTHONPATH": str(STAND_IN), **environment}}}


@pytest.fixture(scope="module")
def steps(models: Models, reward_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one step of each made, or its error."""
    root, port = tmp_path_factory.mktemp("engines"), free_port()
    serving = {"model": {"restore_from_path": models.rm}, "server": {"port": port}, "optimizer": {"lr": 1e-6}}
    critic = Job("critic", 1, serving, root / "critic")

    def run(engine: dict[str, Any], generation: dict[str, Any] = {}, **ppo: Any) -> dict[str, Any]:  # noqa: B006
        sizes = {"max_steps": 1, "rollout_batch_size": 8, "mini_batch_size": 8}
        return {
            "model": {"restore_from_path": models.sft},
            "data": {"train": models.data / "prompts.train.jsonl", "max_prompt_length": 16},
            "generation": {"max_new_tokens": 20, **generation},
            "engine": engine,
            "ppo": {**sizes, **ppo},
            "energy": {},
            "shaping": {"energy_penalty": {"eta": 1.0}, "missing_eos": {"penalty": PENALTY}},
            "optimizer": {"lr": 1e-6},
            "critic": {"server": {"url": f"grpc://127.0.0.1:{port}"}},
            "rewards": [{"server": {"url": reward_url}}],
        }

    runs = {
        "megatron": run({}),
        "tensorrt_llm": run(trtllm()),
        "other weights": run(trtllm(STAND_IN_PERTURB="0.9"), mismatch_limit=0.01),
        "corrected": run(trtllm(STAND_IN_PERTURB="0.9"), mismatch_limit=None, importance_cap=1e-4),
        "stop strings": run({}, {**STOPPING, "min_new_tokens": 4}),
        "refused": run(trtllm(), {"min_new_tokens": 4}),
    }
    for name, values in runs.items():
        values["energy"]["cache"] = root / name
    try:
        actor = Job("methods", 1, json.loads(json.dumps(runs, default=str)), root / "actor")
        assert actor.wait(240) == 0, actor.log.read_text()[-6000:]
    finally:
        critic.stop()
    found: dict[str, Any] = json.loads((root / "actor" / "methods.json").read_text())
    for name, tensors in torch.load(root / "actor" / "methods.pt", weights_only=False).items():
        found[name] |= tensors
    return found


@pytest.mark.slow
def test_a_ppo_step_with_an_engine_in_a_process_of_its_own(steps: dict[str, Any]) -> None:
    ours, theirs = steps["megatron"]["metrics"], steps["tensorrt_llm"]["metrics"]
    assert theirs["rollout/engine_mismatch_max"] < 1e-4, "the policy's weights"
    # the reference's greedy answers and their energies, so the reference's weights
    assert theirs["energy/reference"] == pytest.approx(ours["energy/reference"], rel=1e-4)
    assert theirs["actor/grad_norm"] > 0


@pytest.mark.slow
def test_an_engine_with_other_weights_raises_the_alarm_before_training(steps: dict[str, Any]) -> None:
    error = steps["other weights"]["error"]
    assert error.startswith("|logp_engine - logp_trainer| per token: mean 0.")
    assert "the mean is above ppo.mismatch_limit = 0.01" in error


@pytest.mark.slow
def test_truncated_importance_sampling_changes_what_is_trained_on_such_an_engine(steps: dict[str, Any]) -> None:
    """A cap that next to nothing of the gradient passes, whatever the engine sampled."""
    corrected, uncorrected = (steps[name]["metrics"] for name in ("corrected", "tensorrt_llm"))
    sizes = [corrected[f"rollout/engine_mismatch_{name}"] for name in ("p50", "p90", "p99", "max")]
    assert 0 < sizes[0] < sizes[1] <= sizes[2] <= sizes[3]
    assert corrected["rollout/engine_mismatch_mean"] > uncorrected["rollout/engine_mismatch_max"]
    assert 0 < corrected["actor/grad_norm"] < 1e-3 * uncorrected["actor/grad_norm"]


# that both engines end it there is seen in tests/generation/test_engine_protocol
@pytest.mark.slow
def test_a_response_that_a_stop_string_ends_is_trained_on_as_finished(steps: dict[str, Any], models: Models) -> None:
    step, tokenizer = steps["stop strings"], Tokenizer.from_directory(models.data / "tokenizer")
    batch, strings, stopped = step["batch"], STOPPING["stop_strings"], 0
    assert step["metrics"]["rollout/engine_mismatch_max"] < 1e-4, "the penalised distribution, without EOS at first"
    for row, truncated in enumerate(batch.truncated.tolist()):
        response = batch.tokens[row, batch.prompt_lengths[row] : batch.lengths[row]].tolist()
        before, text = tokenizer.decode(response[:-1]), tokenizer.decode(response)
        assert not any(string in before for string in strings), "it ends with the first stop string"
        assert tokenizer.eos_id not in response[:-1]
        by_string = any(string in text for string in strings)
        assert truncated == (not by_string and response[-1] != tokenizer.eos_id)
        assert int(batch.mask[row].sum()) == len(response), "the stop string counts, and no EOS is added"
        assert step["rows"][row]["reward/missing_eos"] == (-PENALTY if truncated else 0)
        if by_string:
            stopped += 1
            assert step["experience"].rewards[row, batch.lengths[row] - 2] != 0, "its last token has the reward"
    assert stopped >= 3
    assert step["metrics"]["rollout/truncated_fraction"] == batch.truncated.float().mean().item()
    assert step["metrics"]["actor/grad_norm"] > 0


@pytest.mark.slow
def test_an_engine_refuses_what_it_cannot_do_by_name(steps: dict[str, Any]) -> None:
    assert steps["refused"]["error"].startswith("generation.min_new_tokens = 4: TensorRT-LLM has no counterpart")


def test_mismatch_and_weights_are_those_of_the_tokens_that_were_sampled() -> None:
    engine = [[-1.0, -2.0, -0.5], [-3.0]]
    completions = [Completion([5] * len(row), torch.tensor(row), FinishReason.LENGTH, 1) for row in engine]
    batch = RolloutBatch.from_completions([[3, 4], [3]], completions, 0)
    logprobs = torch.full_like(batch.engine_logprobs, torch.nan)  # nothing outside the responses counts
    logprobs[0, 1:4], logprobs[1, 0] = torch.tensor([-1.5, -1.0, -0.5]), -3.25
    found = engine_mismatch(batch, logprobs, limit=0.5)
    expected = {"mean": 1.75 / 4, "max": 1.0, "p50": 0.25, "p90": 0.5, "p99": 0.5}
    assert found == {f"rollout/engine_mismatch_{name}": pytest.approx(value) for name, value in expected.items()}
    with pytest.raises(EngineMismatchError, match=r"mean 0.438, .*mismatch_limit = 0.4"):
        engine_mismatch(batch, logprobs, limit=0.4)
    weights = truncated_importance_weights(logprobs, batch.engine_logprobs, batch.mask, cap=2.0)
    torch.testing.assert_close(weights[batch.mask], torch.tensor([-0.5, 1.0, 0.0, -0.25]).exp().clamp(max=2.0))
