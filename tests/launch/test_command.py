"""A job's command line says what its settings say, and no secret."""

import re
from pathlib import Path, PurePath
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from jobs import Models
from launched import eppo, write
from omegaconf import OmegaConf

from nemo_eppo.config import ConfigError
from nemo_eppo.launch.command import CRITIC, REWARDS, Address, overrides
from nemo_eppo.launch.launch_file import read_launch

VALUES: dict[str, Any] = {
    "none": None,
    "yes": True,
    "small": 5e-7,
    "spaces": "a b, c=d: [e] {f}",
    "quotes": "it's \"so\" 'said'",
    "backslashes": "C:\\dir\\",
    "both": "\\'",
    "looks_like_a_number": "12",
    "looks_like_null": "null",
    "empty": "",
    "function": "nemo_eppo.tools.noun_task:gold_reward",
    "list": [1, "x'y", {"url": "grpc://10.0.0.1:5555"}],
    "nothing": {},
}


def read_back(arguments: list[str], directory: Path) -> dict[str, Any]:
    """What Hydra, which the scripts use, makes of `key=value` arguments."""
    (directory / "empty.yaml").write_text("{}")
    with initialize_config_dir(str(directory), version_base="1.3"):
        found: Any = OmegaConf.to_container(compose("empty", [f"++{argument}" for argument in arguments]), resolve=True)
    assert isinstance(found, dict)
    return found


def test_every_value_reaches_the_script_as_it_is(models: Models, tmp_path: Path) -> None:
    launch = eppo(models, tmp_path / "out")
    launch["jobs"]["critic"]["settings"]["deep"] = {"er": VALUES}
    file = write(launch, tmp_path / "launch.yaml")
    arguments = overrides(read_launch(file), "critic", {"critic": Address("")})
    assert read_back(arguments, tmp_path)["deep"]["er"] == VALUES


def test_the_actor_finds_its_servers_and_their_certificates(models: Models, tmp_path: Path) -> None:
    values = eppo(models, tmp_path / "out")
    values["jobs"]["gold"] = values["jobs"]["reward"]
    values["jobs"]["critic"]["settings"]["reward_model"] = str(models.rm)
    values["jobs"]["actor"].update(needs=["critic", "reward", "gold"], held_out="gold")
    launch = read_launch(write(values, tmp_path / "launch.yaml"))
    certificates = PurePath("/out/certificates")
    addresses = {
        "critic": Address("grpc://10.0.0.1:5555", "0.0.0.0", 5555, certificates),
        "reward": Address("grpc://10.0.0.2:5556", "0.0.0.0", 5556, certificates),
        "gold": Address("grpc://127.0.0.1:5557"),
    }
    arguments = overrides(launch, "actor", addresses)
    found = read_back(arguments, tmp_path)
    assert found["critic"] == {"server": {"url": "grpc://10.0.0.1:5555", "certificates": "/out/certificates"}}
    assert found["rewards"] == [
        {"server": {"url": "grpc://10.0.0.1:5555", "job": "critic", "certificates": "/out/certificates"}},
        {"server": {"url": "grpc://10.0.0.2:5556", "certificates": "/out/certificates"}},
    ]
    assert found["held_out_reward"] == {"server": {"url": "grpc://127.0.0.1:5557"}}
    server = read_back(overrides(launch, "reward", addresses), tmp_path)["server"]
    assert server == {"host": "0.0.0.0", "port": 5556, "certificates": "/out/certificates"}


def test_rewards_that_need_no_server_stand_beside_those_that_do(models: Models, tmp_path: Path) -> None:
    values = eppo(models, tmp_path / "out")
    function = {"function": "rewards:length"}
    values["jobs"]["actor"].update(needs=["reward"])
    values["jobs"]["actor"]["settings"] |= {CRITIC: None, REWARDS: [function]}
    launch = read_launch(write(values, tmp_path / "launch.yaml"))
    addresses = {"reward": Address("grpc://127.0.0.1:5556"), "critic": Address("grpc://127.0.0.1:5555")}
    found = read_back(overrides(launch, "actor", addresses), tmp_path)
    assert OmegaConf.select(OmegaConf.create(found), REWARDS) == [
        function,
        {"server": {"url": "grpc://127.0.0.1:5556"}},
    ]
    assert OmegaConf.select(OmegaConf.create(found), CRITIC) is None


def test_a_reward_that_names_a_job_gets_its_address_and_keeps_its_place(models: Models, tmp_path: Path) -> None:
    values = eppo(models, tmp_path / "out")
    values["jobs"]["critic"]["settings"]["reward_model"] = str(models.rm)
    values["jobs"]["gold"] = values["jobs"]["reward"]
    function = {"function": "rewards:length"}
    values["jobs"]["actor"] |= {"needs": ["critic", "reward", "gold"], "held_out": "gold"}
    values["jobs"]["actor"]["settings"][REWARDS] = [
        {"job": "reward", "weight": 0.7, "mean": -1.5, "std": 2.0, "server": {"request_timeout": 5.0}},
        function,
        {"job": "critic"},
    ]
    launch = read_launch(write(values, tmp_path / "launch.yaml"))
    assert launch.rewards("actor") == ["reward", "critic"]
    folder = PurePath("/out/certificates")
    addresses = {name: Address(f"grpc://127.0.0.1:{5555 + i}", "", 0, folder) for i, name in enumerate(launch.servers)}
    found = read_back(overrides(launch, "actor", addresses), tmp_path)[REWARDS]
    reward, critic = addresses["reward"].url, addresses["critic"].url
    own = {"weight": 0.7, "mean": -1.5, "std": 2.0}
    assert found == [
        {**own, "server": {"request_timeout": 5.0, "url": reward, "certificates": str(folder)}},
        function,
        {"server": {"url": critic, "job": "critic", "certificates": str(folder)}},
    ]


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([{"job": "rm9"}], "{job: rm9}: expected one of its needs that serves a reward to train with: reward, second"),
        ([{"job": "critic"}], "{job: critic}: expected one of its needs that serves"),
        ([{"job": "second"}, {"job": "second"}], "{job: second}: this job is named twice"),
        ([{"job": "second"}], "the job reward is left out, expected {job: reward}, or no job"),
        ([{"job": "reward", "function": "a:b"}], "{job: reward}: expected no function"),
        ([{"job": "reward", "server": {"url": "grpc://a:1"}}], "{job: reward}: expected no server.url"),
        ([{"job": "reward", "server": 5}], "{job: reward}: expected no server = 5"),
    ],
)
def test_a_job_that_rewards_name_wrongly_is_named(rewards: Any, words: str, models: Models, tmp_path: Path) -> None:
    values = eppo(models, tmp_path / "out")
    values["jobs"]["second"] = values["jobs"]["reward"]
    values["jobs"]["actor"]["needs"] = ["critic", "reward", "second"]
    values["jobs"]["actor"]["settings"][REWARDS] = rewards
    with pytest.raises(ConfigError, match=re.escape(words)) as refused:
        read_launch(write(values, tmp_path / "launch.yaml"))
    assert "jobs.actor.settings.rewards" in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({CRITIC: None}, f"{CRITIC} = None: expected no value here"),
        (
            {REWARDS: [{"server": {}}]},
            f"{REWARDS} = [{{'server': {{}}}}]: expected no value here, the launcher sets it",
        ),
    ],
)
def test_what_the_launcher_sets_is_not_set_as_well(
    models: Models, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    values = eppo(models, tmp_path / "out")
    values["jobs"]["actor"]["settings"] |= settings
    launch = read_launch(write(values, tmp_path / "launch.yaml"))
    with pytest.raises(ConfigError, match=re.escape(words)):
        overrides(launch, "actor", dict.fromkeys(launch.servers, Address("grpc://127.0.0.1:1")))
