"""Bad settings of reward-model training and of the servers."""

import re
from pathlib import Path

import pytest
from bad_input import BASE, BUILT, Row, check, command, prepare, run

REWARD_TRAINING = [
    Row(
        "an unknown kind",
        "reward.kind=pairrm",
        r"reward\.kind = 'pairrm': Input should be 'bradley_terry', 'odin' or 'inform'",
    ),
    Row(
        "InfoRM without SFT responses",
        "reward.kind=inform",
        r"reward: kind 'inform' needs inform\.sft_responses",
    ),
    Row("an average of one", "ensemble.average=true", "ensemble: average = true needs at least 2 members, got 1"),
    Row(
        "an average of different heads",
        "ensemble.members=2 ensemble.average=true",
        r"ensemble\.average = true averages members that share one head: set ensemble\.linear_probe_steps, or",
    ),
    Row(
        "a member's learning rate of 0",
        "ensemble.members=2 ensemble.lrs=[0.0,1e-5]",
        r"ensemble: lrs: 0\.0; expected numbers above 0",
    ),
]

SERVERS = [
    Row(
        "a model that is nowhere",
        "model.restore_from_path=nowhere",
        r"model\.restore_from_path: nowhere does not exist",
    ),
    Row(
        "open to the network without certificates",
        "server.host=0.0.0.0",
        r"server: host 0\.0\.0\.0 is open to the network: expected certificates, or host 127\.0\.0\.1",
    ),
    Row(
        "an address of another machine",
        "server.host=127.0.0.300",
        r"server\.host = '127\.0\.0\.300': expected an address of this machine",
    ),
    Row(
        "a port beyond 65535", "server.port=99999", r"server\.port = 99999: Input should be less than or equal to 65535"
    ),
    Row(
        "no certificates in the folder",
        "server.certificates=empty",
        r"certificates = empty: no ca\.pem, cert\.pem, key\.pem; expected ca\.pem, cert\.pem and key\.pem, as",
        {"empty": None},
    ),
    Row(
        "a key that others may read",
        "server.certificates=pem",
        r"certificates = pem: key\.pem has mode 644, expected 600",
        {"pem/ca.pem": "", "pem/cert.pem": "", "pem/key.pem": ""},
    ),
    Row(
        "a fresh model",
        "model.architecture={num_layers:1,hidden_size:8,ffn_hidden_size:8,num_attention_heads:1,max_sequence_length:9}",
        "model: exactly one of restore_from_path and architecture has to be set",
    ),
    Row(
        "a token in the settings",
        "server.token=secret",
        r"server\.token: unknown key \(known keys: host, port, certificates, max_batch_size, ready_file\)",
    ),
]
"""Settings of both servers, tried with that of reward models."""

CRITIC = [
    Row(
        "a policy beside it",
        "reward_model=sft",
        r"reward_model\.restore_from_path: sft holds a model with head 'lm', expected 'scalar'",
    ),
    Row(
        "a policy to start from",
        "model.restore_from_path=data",
        r"model\.restore_from_path: data is no checkpoint and holds none \(step_\*\)",
    ),
    Row("a negative clip", "value_clip=-0.2", r"value_clip = -0\.2: Input should be greater than 0"),
]

REWARD_SERVER = [
    Row(
        "a policy",
        "model.restore_from_path=sft",
        r"model\.restore_from_path: sft holds a model with head 'lm', expected 'scalar'",
    ),
    Row(
        "adapters to train",
        "model.lora={rank:8}",
        r"model\.lora is for models that are trained; adapters of a checkpoint are merged on load",
    ),
    Row("an optimizer", "optimizer.lr=1e-6", r"optimizer: unknown key \(known keys: exp_manager, model, server\)"),
    Row(
        "a ready file below a file",
        "server.ready_file=file/ready",
        "file: File exists; a file is in the way; choose another name",
        {"file": "x"},
        status=1,
    ),
]

TABLE = [
    *(("train_reward_model", row) for row in REWARD_TRAINING),
    *(("serve_reward_model", row) for row in (*SERVERS, *REWARD_SERVER)),
    *(("serve_ppo_critic", row) for row in CRITIC),
]


@pytest.mark.parametrize(("script", "row"), TABLE, ids=[f"{script}: {row}" for script, row in TABLE])
def test_ends_with_one_clear_message(script: str, row: Row, world: Path, directory: Path) -> None:
    check(row, command(script, row.command), world, directory)


@pytest.mark.parametrize("script", BASE)
def test_a_misspelt_key(script: str, world: Path, directory: Path) -> None:
    message = r"model\.restore_from_pth: unknown key \(did you mean 'restore_from_path'\?\)"
    check(Row("misspelt", "", message), command(script, "model.restore_from_pth=x"), world, directory)


@pytest.mark.parametrize("script", BASE)
def test_the_same_command_without_the_fault_builds_a_model(script: str, world: Path, directory: Path) -> None:
    own = Row("", "rewards=[{function:math:fabs}]" if script == "train_gpt_ppo_actor" else "", "")
    prepare(world, directory, own)
    status, output = run(command(script, own.command), directory)
    assert status == 1
    assert re.search(BUILT, output), output
