"""A real PyTriton server on two ranks: answers, errors, lock step, repeated updates, and every way to end."""

import os
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from jobs import end_of
from pydantic import ValidationError
from server_process import Server, running_server
from tiny_server import EXPECT, FAIL, MAX_BATCH, NAN, SLEEP, VOCAB, embedding

from nemo_eppo.config import ConfigError
from nemo_eppo.servers.client import CriticClient, RewardClient, ServerUnavailable
from nemo_eppo.servers.intake import Intake
from nemo_eppo.servers.protocol import RequestError, json_array
from nemo_eppo.servers.transport import ServerError, Transport
from nemo_eppo.settings.servers import ClientConfig, ServerConfig


def batch(size: int = 4, length: int = 9, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that ask for no misbehaviour unless `first` does, and lengths."""
    tokens = torch.randint(0, VOCAB - 4, (size, length), generator=torch.Generator().manual_seed(size))
    tokens[0, 0] = first
    return tokens, torch.full((size,), length)


def update(critic: CriticClient, step: int, shift: float = 1.0) -> dict[str, float]:
    tokens, lengths = batch()
    values = torch.zeros(4, 8)
    return critic.train(tokens, lengths, values + shift, values, torch.ones(4, 8, dtype=torch.bool), step).result()


def raw(server: Server, endpoint: str, **arrays: np.ndarray) -> dict[str, Any]:
    """A request that no client has checked."""
    return Transport(server.url, server.certificates).request(endpoint, arrays, timeout=20.0)


def test_outputs_are_those_of_the_model_split_over_two_ranks(critic: CriticClient) -> None:
    tokens, lengths = batch()
    bias = critic.status()["bias"]
    torch.testing.assert_close(critic.infer(tokens, lengths).result(), embedding()[tokens][:, 1:] + bias)


def test_reward_models_without_latents_give_latents_of_width_zero(server: Server) -> None:
    tokens, lengths = batch()
    with RewardClient(server.client_config, name="critic") as client:
        client.connect(EXPECT)
        rewards, latents = client.infer(tokens, torch.full((4,), 3), lengths).result()
    score = embedding()[tokens][:, 3:].sum(1)
    torch.testing.assert_close(rewards, torch.stack([score, -score], 1))
    assert latents.shape == (4, 0)


def test_large_batches_are_split_by_the_servers_limit_and_keep_their_order(
    server: Server, critic: CriticClient
) -> None:
    tokens, lengths = batch(2 * MAX_BATCH + 3)
    before = critic.status()
    values = critic.infer(tokens, lengths).result()
    torch.testing.assert_close(values, embedding()[tokens][:, 1:] + before["bias"])
    assert critic.status()["calls"] == before["calls"] + 3
    tokens[MAX_BATCH + 1, 0] = VOCAB
    with CriticClient(server.client_config) as own:  # at its end the other parts of the request have been answered
        own.connect(EXPECT)
        with pytest.raises(ServerError, match=rf"critic_infer \(rows from {MAX_BATCH}\): tokens\[1, 0\] = {VOCAB}"):
            own.infer(tokens, lengths).result()


def corrupt(name: str, value: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name].flat[-1] = value

    return change


def widen(arrays: dict[str, np.ndarray]) -> None:
    arrays.update(tokens=np.zeros((9, 9), np.int32), lengths=np.full(9, 9, np.int32))
    arrays.update({name: np.zeros((9, 8), arrays[name].dtype) for name in ("returns", "values", "mask")})


BAD = {
    "token": (corrupt("tokens", VOCAB), rf"tokens\[3, 8\] = {VOCAB}, expected a token id"),
    "length": (corrupt("lengths", 10), r"lengths\[3\] = 10, expected a length in \[2, 9\]"),
    "nan return": (corrupt("returns", np.nan), r"returns\[3, 7\] = nan, expected a finite number"),
    "oversize batch": (widen, rf"tokens = shape \[9, 9\], expected at most {MAX_BATCH}"),
    "shape": (lambda arrays: arrays.update(mask=arrays["mask"][:, 1:].copy()), r"mask = shape \[4, 7\]"),
    "no response": (lambda arrays: arrays["mask"].fill(0), "mask = all 0"),
    "step": (corrupt("step", 1000), "step = 1000, expected .*: the last applied update is"),
    # These are refused by Triton itself.
    "dtype": (
        lambda arrays: arrays.update(tokens=arrays["tokens"].astype(np.int64)),
        "'tokens' data-type is 'INT64'.* expects 'INT32'",
    ),
    "rank": (lambda arrays: arrays.update(tokens=arrays["tokens"][0]), r"'tokens'.*Expected \[-1,-1\], got \[9\]"),
    "missing": (lambda arrays: arrays.pop("mask"), r"missing required input\(s\) \['mask'\]"),
    "unknown": (lambda arrays: arrays.update(weight=arrays["mask"]), "weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_request_reaches_no_rank_and_the_server_goes_on(server: Server, critic: CriticClient, name: str) -> None:
    change, message = BAD[name]
    arrays: dict[str, np.ndarray] = {
        "tokens": np.ones((4, 9), np.int32),
        "lengths": np.full(4, 9, np.int32),
        "returns": np.zeros((4, 8), np.float32),
        "values": np.zeros((4, 8), np.float32),
        "mask": np.ones((4, 8), np.uint8),
        "step": np.array([critic.status()["step"] + 1]),
    }
    before = critic.status()
    change(arrays)
    with pytest.raises(ServerError, match=message) as caught:
        raw(server, "critic_train", **arrays)
    assert "Traceback" not in str(caught.value)
    assert critic.status() == before
    critic.infer(*batch()).result()  # asserts on every rank that all ranks have made as many calls


def test_empty_batch_is_refused_and_the_server_goes_on(server: Server, critic: CriticClient) -> None:
    with pytest.raises(RequestError, match=r"tokens = shape \[0, 9\], expected .*nothing empty"):
        critic.infer(torch.zeros(0, 9, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    before = critic.status()
    with pytest.raises((ServerError, ConnectionError)):
        raw(server, "critic_infer", tokens=np.zeros((0, 9), np.int32), lengths=np.zeros(0, np.int32))
    assert critic.status() == before
    critic.infer(*batch()).result()


def test_failure_on_all_ranks_is_an_error_and_the_server_goes_on(critic: CriticClient) -> None:
    with pytest.raises(ServerError, match=r"critic server at grpc://127.0.0.1:\d+, critic_infer: non-finite loss"):
        critic.infer(*batch(first=FAIL)).result()
    critic.infer(*batch()).result()


def test_nan_in_an_answer_is_an_error_that_names_the_row_unless_it_is_padding(critic: CriticClient) -> None:
    tokens, lengths = batch(first=NAN)  # the server puts NaN into values[2, 5]
    with pytest.raises(ServerError, match=r"answered values\[2, 5\] = nan, expected a number within 1e\+15"):
        critic.infer(tokens, lengths).result()
    lengths[2] = 5  # token 5 is padding
    assert critic.infer(tokens, lengths).result().shape == (4, 8)


def test_repeated_update_is_not_applied_twice(critic: CriticClient) -> None:
    step = critic.status()["step"]
    first = update(critic, step + 1)
    assert update(critic, step + 1) == first
    assert critic.status()["step"] == step + 1
    assert critic.status()["bias"] == first["bias"]
    with pytest.raises(ServerError, match=f"step = {step + 1}, expected {step + 2}: .*other data"):
        update(critic, step + 1, shift=3.0)
    with pytest.raises(
        ServerError, match=f"step = {step + 3}, expected {step + 2}: the last applied update is {step + 1}"
    ):
        update(critic, step + 3)
    assert update(critic, step + 2)["bias"] != first["bias"]


def test_only_the_current_step_is_saved(critic: CriticClient) -> None:
    step = critic.status()["step"]
    assert critic.save(step, [2, 4]).result() == f"checkpoints/step_{step} and [0, 2, 4]"
    with pytest.raises(ServerError, match=f"step = {step + 1}, expected {step}"):
        critic.save(step + 1, []).result()


def test_updates_arrive_in_the_order_of_the_calls(critic: CriticClient) -> None:
    step = critic.status()["step"]
    tokens, lengths = batch()
    zeros, mask = torch.zeros(4, 8), torch.ones(4, 8, dtype=torch.bool)
    futures = [critic.train(tokens, lengths, zeros + i, zeros, mask, step + 1 + i) for i in range(10)]
    for future in futures:
        future.result()
    assert critic.status()["step"] == step + 10


def test_update_whose_answer_is_lost_is_sent_again_and_applied_once(
    critic: CriticClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, answers = critic._transports[0].request, []

    def lossy(*args: Any, **options: Any) -> dict[str, Any]:
        answers.append(real(*args, **options))
        if len(answers) == 1:
            raise ConnectionError("lost")
        return answers[-1]

    step = critic.status()["step"]
    monkeypatch.setattr(critic._transports[0], "request", lossy)
    metrics = update(critic, step + 1)
    assert answers == [{"metrics": metrics}] * 2
    assert critic.status()["step"] == step + 1


def test_concurrent_requests_get_their_own_answers(critic: CriticClient) -> None:
    bias = critic.status()["bias"]

    def ask(thread: int) -> None:
        for i in range(8):
            tokens, lengths = batch(1 + thread, 5 + i)
            torch.testing.assert_close(critic.infer(tokens, lengths).result(), embedding()[tokens][:, 1:] + bias)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(ask, thread) for thread in range(8)]:
            future.result()


def test_status_is_answered_while_the_ranks_are_busy(critic: CriticClient) -> None:
    tokens, lengths = batch(first=SLEEP)
    tokens[0, 1] = 2  # seconds
    future = critic.infer(tokens, lengths)
    while critic.status()["busy"] != "critic_infer":
        time.sleep(0.02)
    assert not future.done()
    future.result()
    assert critic.status()["busy"] == ""


def test_server_that_hangs_is_reported_and_can_be_used_again_when_it_recovers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_eppo.servers.server_client.HEALTH_INTERVAL_S", 0.2)
    monkeypatch.setattr("nemo_eppo.servers.server_client.HEALTH_TIMEOUT_S", 0.5)
    with CriticClient(server.client_config) as critic:
        rank0 = psutil.Process(critic.connect(EXPECT)["pids"][0])
        rank0.suspend()
        try:
            with pytest.raises(ServerUnavailable, match=r"unavailable for critic_infer: .*status: no answer"):
                critic.infer(*batch()).result(timeout=30)
        finally:
            rank0.resume()
        critic.connect(EXPECT)
        critic.infer(*batch()).result()


def test_tensor_of_another_kind_is_refused_before_anything_is_sent(critic: CriticClient) -> None:
    tokens, lengths = batch()
    with pytest.raises(RequestError, match=r"tokens = torch\.float32, expected int"):
        critic.infer(tokens.float(), lengths)
    with pytest.raises(RequestError, match=r"mask = torch\.int64, expected bool"):
        critic.train(tokens, lengths, torch.zeros(4, 8), torch.zeros(4, 8), torch.ones(4, 8).long(), 1)
    with pytest.raises(RequestError, match=r"lengths = shape \[3\], expected int32 \[B\] with B = 4"):
        critic.infer(tokens, lengths[:3])
    with pytest.raises(ServerError, match=r"tokens\[0, 0\] = 2147483647, expected a token id"):
        critic.infer(torch.where(tokens == tokens[0, 0], 2**40, tokens), lengths).result()


def test_connect_reports_every_difference_at_once(server: Server) -> None:
    with CriticClient(server.client_config) as client, pytest.raises(ServerError) as caught:
        client.connect({"vocab_size": 7, "tokenizer": "other", "max_sequence_length": 10**6, "step": 12345})
    for part in (
        f"vocab_size is {VOCAB}, expected 7",
        "'tiny', expected 'other'",
        "at least 1000000",
        "12345",
        server.url,
    ):
        assert part in str(caught.value)
    with (
        RewardClient(server.client_config) as reward,
        pytest.raises(ServerError, match="job is 'critic', expected 'reward'"),
    ):
        reward.connect({})


def test_connect_gives_up_after_its_timeout() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"grpc://127.0.0.1:{unused.getsockname()[1]}"
        with CriticClient(ClientConfig(url=url, connect_timeout=0.2)) as client:
            with pytest.raises(ServerUnavailable, match=f"critic server at {url} unavailable for status"):
                client.connect({})
            with pytest.raises(RuntimeError, match="`connect` comes before"):
                client.infer(*batch())


def test_any_rank_told_to_stop_ends_all_cleanly(tmp_path: Path) -> None:
    with running_server(tmp_path) as server, CriticClient(server.client_config) as client:
        pids = client.connect(EXPECT)["pids"]
        processes = server.processes()
        [triton] = [p for p in processes if "tritonserver" in p.name()]
        assert triton.environ()["CUDA_VISIBLE_DEVICES"] == "", "it would take memory of every GPU"
        os.kill(pids[1], signal.SIGTERM)
        assert end_of(server.torchrun, 60) == 0  # 0 only if all ranks give 0
        assert not psutil.wait_procs(processes, timeout=10)[1]
        assert "Traceback" not in server.output.read_text()
        assert not server.ready_file.exists()


def test_taken_port_is_reported_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_eppo.servers.frontend.EXIT_TIMEOUT_S", 0.1)  # of a server that had the port before

    class Nothing:
        name, vocab_size, max_sequence_length, step = "critic", 1, 2, 0
        endpoints: dict[str, Any] = {}  # noqa: RUF012

        def status(self) -> dict[str, Any]:
            return {}

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        intake = Intake(Nothing(), {}, ServerConfig(port=port))
        with pytest.raises(ConfigError, match=f"port = {port}: cannot listen on .*in use"), intake.open():
            pass


def test_server_open_to_the_network_demands_certificates() -> None:
    with pytest.raises(ValidationError, match="expected certificates"):
        ServerConfig(host="0.0.0.0")


def test_error_payload_is_json_with_all_parts() -> None:
    payload = json_array(RequestError("lengths[2]", 99, "at most 9").payload())
    assert payload.shape == (1,)
    assert payload[0] == (
        b'{"field": "lengths[2]", "value": "99", "expected": "at most 9", '
        b'"message": "lengths[2] = 99, expected at most 9"}'
    )


# the last one: the server of this file's tests is gone then
def test_killed_server_is_reported_and_leaves_no_process(server: Server) -> None:
    with CriticClient(server.client_config) as client:
        pids = client.connect(EXPECT)["pids"]
        children = psutil.Process(pids[0]).children(recursive=True)
        tokens, lengths = batch(100 * MAX_BATCH, first=SLEEP)  # a hundred requests; one failure tells
        tokens[0, 1] = VOCAB - 5  # seconds
        future = client.infer(tokens, lengths)
        while client.status()["busy"] != "critic_infer":
            time.sleep(0.02)
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(ServerUnavailable, match=f"critic server at {server.url} unavailable for critic_infer"):
            future.result(timeout=30)
        assert not psutil.wait_procs(children, timeout=30)[1]
