"""The distributed product (Megatron layouts, PyTriton servers) matches the single-process fp64 reference of EPPO."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import free_port, run_ranks
from jobs import Job, Models, read_weights
from reference_eppo import State, ppo_step

from nemo_eppo.rollout.batch import minibatches, step_seed

SEED, BATCH, MINI_BATCH, EPOCHS = 11, 8, 4, 2
TOLERANCE = 1e-5
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2_sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
    "tp2_sp_packed": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}
PACKED = 70  # tokens per micro-batch: two to four rows


READ_BY_ENGINE = ("pp2", "tp2")  # log-probs and energies come from decoding
SHOWN_TWICE = ("tp2", "tp2_sp", "dp2")  # packed, and padded in other layouts; replicas in test_layouts, test_estimators


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=[pytest.mark.slow] * (name in SHOWN_TWICE)) for name in LAYOUTS]
)
def test_three_steps_match_the_reference(layout: str, models: Models, reward_url: str, tmp_path: Path) -> None:
    reference, parallel = models.reference, LAYOUTS[layout]
    adam, port = {"weight_decay": reference.weight_decay, "eps": reference.adam_eps}, free_port()
    micro_batches = {"micro_batch_tokens": PACKED} if layout.endswith("packed") else {"micro_batch_size": 2}
    critic = Job(
        "critic",
        2,
        {
            "model": {"restore_from_path": models.rm, "parallel": parallel, **micro_batches},
            "optimizer": {"lr": reference.critic_lr, **adam},
            "server": {"port": port},
        },
        tmp_path / "critic",
    )
    try:
        actor = Job(
            "steps",
            2,
            {
                "seed": SEED,
                "model": {"restore_from_path": models.sft, "parallel": parallel, **micro_batches},
                "data": {"train": models.data / "prompts.train.jsonl", "max_prompt_length": 16},
                "generation": {"max_new_tokens": 20},
                "ppo": {
                    "max_steps": 3,
                    "rollout_batch_size": BATCH,
                    "mini_batch_size": MINI_BATCH,
                    "epochs": EPOCHS,
                    "old_logprobs": "engine" if layout in READ_BY_ENGINE else "recompute",
                },
                "energy": {"reference": "same_response"},
                "shaping": {
                    "energy_penalty": {"eta": reference.eta},
                    "kl": {"coefficient": reference.kl_coefficient},
                    "missing_eos": {"penalty": reference.missing_eos},
                },
                "optimizer": {"lr": reference.actor_lr, **adam},
                "critic": {"server": {"url": f"grpc://127.0.0.1:{port}"}},
                "rewards": [{"server": {"url": reward_url}}],
            },
            tmp_path / "actor",
        )
        assert actor.wait(300) == 0, actor.log.read_text()[-6000:]
    finally:
        critic.stop()
    made = torch.load(tmp_path / "actor" / "steps.pt", weights_only=False)

    state = State(reference, models.policy, models.policy, models.scorer, models.scorer)
    for number, step in enumerate(made["steps"], start=1):
        batch, experience, metrics = step["batch"], step["experience"], step["metrics"]
        updates = [
            rows.tolist()
            for epoch in range(EPOCHS)
            for rows in minibatches(BATCH, MINI_BATCH, step_seed(SEED, number), epoch)
        ]
        expected = ppo_step(state, batch.tokens, batch.prompt_lengths, batch.lengths, batch.truncated, updates)
        mask = expected["mask"]
        compared = number == 1 or layout not in READ_BY_ENGINE
        assert ("rollout/engine_mismatch_mean" in metrics) == compared, "another forward pass"
        assert torch.equal(mask, experience.mask)
        for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
            found = torch.where(mask, getattr(experience, name), 0.0).double()
            torch.testing.assert_close(found, expected[name], rtol=0, atol=TOLERANCE, msg=name)
        for name, found in (("energies", experience.energies), ("ref_energies", experience.ref_energies)):
            torch.testing.assert_close(found[:, 0].double(), expected[name], rtol=0, atol=TOLERANCE)
        for name in ("actor_loss", "critic_loss", "actor_grad_norm", "critic_grad_norm"):
            mean = sum(expected[name]) / len(expected[name])
            assert metrics[name.replace("_", "/", 1)] == pytest.approx(mean, abs=TOLERANCE), name
    # Work that belongs to no phase would show in every step; a rank that the machine holds up, in some.
    assert max(step["metrics"]["seconds/attributed_fraction"] for step in made["steps"]) > 0.95
    assert expected["energies"].sub(expected["ref_energies"]).abs().max() > 1e-4  # the penalty was at work
    assert batch.truncated.any()
    assert not batch.truncated.all()

    critic_weights = run_ranks(read_weights, 1, Path(made["critic"]), models.config, "scalar")[0]
    for found, weights in ((made["policy"], state.policy), (critic_weights, state.critic)):
        assert set(found) == set(weights)
        for name, expected_weight in weights.items():
            torch.testing.assert_close(found[name].double(), expected_weight.detach(), rtol=0, atol=TOLERANCE, msg=name)
