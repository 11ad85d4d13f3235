"""`method=NAME`: every preset makes a real PPO step with real servers, and is what its name says."""

import json
from pathlib import Path
from typing import Any

import pytest
from distributed import free_port
from hydra import compose, initialize_config_dir
from jobs import Job, Models
from omegaconf import OmegaConf

from nemo_eppo.config import load_config
from nemo_eppo.settings.ppo import PPOConfig

CONF = Path(__file__).parents[2] / "conf"
PRESETS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
AT_WORK: dict[str, set[str]] = {
    "ppo": set(),
    "ppo_kl": set(),  # the policy is the reference in the first step
    "ppo_lp": {"reward/length_penalty"},
    "eppo": {"reward/energy_penalty"},
    "eppo_rise": {"reward/energy_penalty"},
    "eppo_kl": {"reward/energy_penalty"},
    "chi2": set(),
    "erm_mean": set(),
    "erm_wco": set(),
    "erm_uwo": set(),
    "odin": set(),
    "warm": set(),
    "eppo_authors": {"reward/energy_penalty"},
    "eppo_odin": {"reward/energy_penalty"},
    "inform": set(),
    "eppo_inform": {"reward/energy_penalty"},
    "inform, penalised": {"reward/latent_penalty"},
    "grpo": set(),
    "dr_grpo": set(),
    "rloo": set(),
    "reinforce_plus_plus": set(),
    "remax": set(),
    "eppo_grpo": {"reward/energy_penalty"},
    "eppo_rloo": {"reward/energy_penalty"},
    "eppo_reinforce_plus_plus": {"reward/energy_penalty"},
}


def composed(*overrides: str) -> dict[str, Any]:
    """What the actor's command line makes of its YAML files."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("gpt_ppo_actor", list(overrides)), resolve=True)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def steps(
    models: Models, trained: dict[str, Path], reward_url: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What one step of each preset made, and the errors of settings that do not fit the servers."""
    root, port = tmp_path_factory.mktemp("methods"), free_port()
    urls, servers = {"plain": reward_url}, []
    for kind, source in trained.items():
        settings: dict[str, Any] = {"model": {"restore_from_path": source}, "server": {"port": free_port()}}
        servers.append(Job("reward", 1, settings, root / kind))
        urls[kind] = f"grpc://127.0.0.1:{settings['server']['port']}"
    serving = {"port": port, "max_batch_size": 6}
    critic_settings = {"model": {"restore_from_path": models.rm}, "server": serving, "optimizer": {"lr": 1e-6}}
    critic = Job("critic", 1, critic_settings, root / "critic")
    common = [
        f"model.restore_from_path={models.sft}",
        f"data.train={models.data / 'prompts.train.jsonl'}",
        "data.max_prompt_length=16",
        "generation.max_new_tokens=20",
        "ppo.rollout_batch_size=8",
        "ppo.mini_batch_size=4",
    ]

    def rewards(count: int, kind: str = "plain") -> str:
        return f"rewards=[{', '.join([f'{{server: {{url: {urls[kind]!r}}}}}'] * count)}]"

    def suitable(name: str) -> str:
        kind = name.removeprefix("eppo_")
        return rewards(3 if name.startswith("erm_") else 1, kind if kind in urls else "plain")

    runs = {}
    for name in PRESETS:
        runs[name] = composed(f"method={name}", *common, suitable(name))
    runs["uwo with one model"] = composed("method=erm_uwo", *common, rewards(1))
    penalised = "++shaping.latent_penalty.gamma=0.1"
    runs["inform, penalised"] = composed("method=inform", *common, suitable("inform"), penalised)
    runs["penalised without latents"] = composed("method=ppo", *common, rewards(1), penalised)
    runs["watched without latents"] = composed("method=ppo", *common, rewards(1), "++monitor.outliers.action=log")
    runs["warm on a plain model"] = composed("method=warm", *common, rewards(1))
    runs["odin on a plain model"] = composed("method=odin", *common, rewards(1))
    runs["inform on an odin model"] = composed("method=inform", *common, rewards(1, "odin"))
    runs["mini-batches beyond the critic's"] = composed("method=eppo", *common, rewards(1), "ppo.mini_batch_size=8")
    runs["two models"] = composed("method=eppo", *common, rewards(2))
    for settings in runs.values():
        if "critic" not in settings:  # an estimator without one has `critic: null`
            settings["critic"] = {"server": {"url": f"grpc://127.0.0.1:{port}"}}
    try:
        actor = Job("methods", 1, runs, root / "actor")
        assert actor.wait(400) == 0, actor.log.read_text()[-6000:]
    finally:
        for job in (critic, *servers):
            job.stop()
    return json.loads((root / "actor" / "methods.json").read_text())


@pytest.mark.parametrize("name", [*PRESETS, "inform, penalised"])
def test_a_preset_makes_a_step_and_its_ledger_adds_up(name: str, steps: dict[str, Any]) -> None:
    assert "error" not in steps[name], steps[name]
    metrics, rows, contributions = (steps[name][key] for key in ("metrics", "rows", "contributions"))
    for row in rows:
        assert sum(row[entry] for entry in contributions) == pytest.approx(row["reward/final"], abs=1e-6)
    changed = {entry for entry in contributions if any(abs(row[entry]) > 0 for row in rows)}
    assert changed - {"reward/proxy", "reward/clip"} == AT_WORK[name]
    assert metrics["actor/grad_norm"] > 0
    assert ("actor/divergence_loss" in metrics) == (name == "chi2")
    assert len([entry for entry in metrics if entry.startswith("reward/score_")]) == (3 if "erm_" in name else 1)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("uwo with one model", "rewards, shaping.combine: scores: 1 reward model, but combine is 'uwo'"),
        (
            "penalised without latents",
            "shaping.latent_penalty (gamma=0.1) needs latents, but none of the reward models in rewards gives",
        ),
        ("watched without latents", "monitor.outliers.action = 'log' needs latents"),
        ("warm on a plain model", "has a reward model of kind 'bradley_terry'"),
        ("odin on a plain model", "reward_kind = 'odin', but the server at grpc://127.0.0.1"),
        ("inform on an odin model", "has a reward model of kind 'odin'"),
        ("mini-batches beyond the critic's", "max_batch_size is 6, expected at least 8"),
        ("two models", "shaping.combine = 'single', but rewards are of 2 reward models"),
    ],
)
def test_servers_that_do_not_fit_the_method_are_named_before_the_first_step(
    run: str, message: str, steps: dict[str, Any]
) -> None:
    assert message in steps[run]["error"]


def test_the_default_method_is_eppo_and_the_command_line_wins() -> None:
    base = ["model.restore_from_path=x", "data.train=y"]
    assert load_config(PPOConfig, composed(*base)) == load_config(PPOConfig, composed("method=eppo", *base))
    shaping = load_config(PPOConfig, composed("method=ppo_lp", "generation.max_new_tokens=77", *base)).shaping
    assert shaping.energy_penalty.eta == 0
    assert shaping.length_penalty.length == 77
    own = composed("method=ppo", "shaping.energy_penalty.eta=3", *base)
    assert load_config(PPOConfig, own).shaping.energy_penalty.eta == 3
