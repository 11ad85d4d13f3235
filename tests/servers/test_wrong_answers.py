"""Answers are checked as requests are: a wrong one is an error that names the server and the field."""

import json
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from tritonclient.grpc import service_pb2, service_pb2_grpc

from nemo_eppo.servers.client import CriticClient, RewardClient
from nemo_eppo.servers.protocol import PROTOCOL_VERSION
from nemo_eppo.servers.server_client import _joined
from nemo_eppo.servers.transport import ServerError
from nemo_eppo.settings.servers import ClientConfig

REWARD = {"k": 2, "mean": [0.0, 1.0], "std": [1.0, 2.0], "kind": "bradley_terry", "latent_size": 3}
STATUS = {"protocol": PROTOCOL_VERSION, "job": "reward", "max_batch_size": 8, "reward": REWARD}
TOKENS, LENGTHS, PROMPTS = torch.ones(2, 5, dtype=torch.int64), torch.full((2,), 5), torch.full((2,), 2)
GOOD = {"rewards": np.zeros((2, 2), np.float32), "latents": np.zeros((2, 3), np.float32)}
_NAMES = {np.dtype(np.float32): "FP32", np.dtype(np.int32): "INT32", np.dtype(np.uint8): "UINT8"}


class Liar(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers what it is told to, by endpoint: arrays by name, a JSON value (`status`), or bytes as they are."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers

    def ModelInfer(self, request: Any, context: Any) -> Any:  # the protocol's name
        answer = service_pb2.ModelInferResponse(model_name=request.model_name)
        for name, value in self.answers[request.model_name].items():
            if isinstance(value, np.ndarray):
                answer.outputs.add(name=name, datatype=_NAMES[value.dtype], shape=value.shape)
                answer.raw_output_contents.append(value.tobytes())
            else:
                answer.outputs.add(name=name, datatype="BYTES", shape=[1])
                raw = value if isinstance(value, bytes) else json.dumps(value).encode()
                answer.raw_output_contents.append(len(raw).to_bytes(4, "little") + raw)
        return answer


@contextmanager
def lying(answers: dict[str, Any]) -> Iterator[ClientConfig]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Liar(answers), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield ClientConfig(url=f"grpc://127.0.0.1:{port}")
    finally:
        server.stop(None)


WRONG_REWARDS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({"latents": GOOD["latents"]}, "rewards = missing"),
    "short": (GOOD | {"rewards": np.zeros((1, 2), np.float32)}, r"rewards = shape \[1, 2\]"),
    "long": (GOOD | {"rewards": np.zeros((3, 2), np.float32)}, r"rewards = shape \[3, 2\]"),
    "flat": (GOOD | {"rewards": np.zeros(4, np.float32)}, r"rewards = float32 of shape \[4\]"),
    "of too many models": (GOOD | {"rewards": np.zeros((2, 4), np.float32)}, r"rewards = shape \[2, 4\]"),
    "integers": (GOOD | {"rewards": np.zeros((2, 2), np.int32)}, "rewards = int32"),
    "huge": (GOOD | {"rewards": np.full((2, 2), 3e38, np.float32)}, r"rewards\[0, 0\] = 3e\+38, expected"),
    "nan": (GOOD | {"rewards": np.array([[0, 0], [0, np.nan]], np.float32)}, r"rewards\[1, 1\] = nan"),
    "no latents": ({"rewards": GOOD["rewards"]}, "latents = none, expected 3 numbers"),
    "undeclared latents": (GOOD | {"latents": np.zeros((2, 4), np.float32)}, r"latents = shape \[2, 4\]"),
    "unknown output": (GOOD | {"bonus": np.zeros((2, 2), np.float32)}, "bonus = an array, expected none of this name"),
    "not JSON": ({"error": b"{"}, "the answer cannot be read: JSONDecodeError"),
    "half an error": ({"error": {"message": "x"}}, "the answer cannot be read: KeyError"),
    "nested too deeply": ({"error": b"[" * 200_000}, "the answer cannot be read: RecursionError"),
    "nothing": ({}, "rewards = missing"),
}


@pytest.mark.parametrize("name", WRONG_REWARDS)
def test_wrong_rewards_are_refused(name: str) -> None:
    answer, message = WRONG_REWARDS[name]
    with lying({"status": {"status": STATUS}, "reward_infer": answer}) as config, RewardClient(config) as client:
        client.connect({})
        with pytest.raises(ServerError, match=message) as caught:
            client.infer(TOKENS, PROMPTS, LENGTHS).result(timeout=30)
        assert f"reward server at {config.url}" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": REWARD | {"std": [1.0, 0.0]}}, "these above 0"),
        ({"reward": REWARD | {"mean": [float("nan"), 0.0]}}, "finite numbers"),
        ({"reward": REWARD | {"mean": 0.0}}, "finite numbers as mean"),
        ({"reward": {"k": 2}}, "latent_size"),
        ({"reward": None}, "latent_size"),
        ({"max_batch_size": 0}, "max_batch_size is 0, expected at least 1"),
        ({"max_batch_size": "8"}, "max_batch_size is '8', expected at least 1"),
        ({"protocol": 1}, f"protocol is 1, expected {PROTOCOL_VERSION}"),
        ({"job": "critic"}, "job is 'critic', expected 'reward'"),
    ],
)
def test_a_status_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with lying({"status": {"status": STATUS | change}}) as config, RewardClient(config) as client:
        with pytest.raises(ServerError, match=message) as caught:
            client.connect({})
        assert config.url in str(caught.value)


WRONG_CRITICS: dict[str, tuple[str, Any, Callable[[CriticClient], Any], str]] = {
    "another step": ("critic_begin", {"step": 5}, lambda critic: critic.begin(1, 0), "step = 5, expected 0"),
    "a step in words": ("critic_begin", {"step": "0"}, lambda critic: critic.begin(1, 0), "one JSON value of type int"),
    "no path": ("critic_save", {"path": None}, lambda critic: critic.save(0, []), "one JSON value of type str"),
    "another reply": ("critic_saved", {"step": 1}, lambda critic: critic.saved(0), "one JSON value of type str"),
    "values too short": (
        "critic_infer",
        {"values": np.zeros((2, 3), np.float32)},
        lambda critic: critic.infer(TOKENS, LENGTHS),
        r"values = shape \[2, 3\]",
    ),
    "a metric that is no number": (
        "critic_train",
        {"metrics": {"critic/loss": None}},
        lambda critic: critic.train(
            TOKENS, LENGTHS, torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(2, 4, dtype=torch.bool), 1
        ),
        "critic/loss.* = None, expected a finite number",
    ),
}


@pytest.mark.parametrize("name", WRONG_CRITICS)
def test_wrong_answers_of_a_critic_are_refused(name: str) -> None:
    endpoint, answer, ask, message = WRONG_CRITICS[name]
    status = STATUS | {"job": "critic"}
    with lying({"status": {"status": status}, endpoint: answer}) as config, CriticClient(config) as client:
        client.connect({})
        with pytest.raises(ServerError, match=message) as caught:
            ask(client).result(timeout=30)
        assert f"critic server at {config.url}" in str(caught.value)


def test_requests_are_shared_among_servers_and_those_of_a_lost_one_go_to_the_others() -> None:
    def marked(mark: float) -> dict[str, Any]:
        rewards = np.full((1, 2), mark, np.float32)
        return {"status": {"status": STATUS}, "reward_infer": {"rewards": rewards, "latents": GOOD["latents"][:1]}}

    with lying(marked(1.0)) as one:
        with lying(marked(2.0)) as two:
            client = RewardClient(one, others=[two.url])
            client.connect({})
            both = client.infer(TOKENS, PROMPTS, LENGTHS).result(timeout=30)
            assert both.rewards[:, 0].tolist() == [1.0, 2.0]
        left = client.infer(TOKENS, PROMPTS, LENGTHS).result(timeout=30)
        assert left.rewards[:, 0].tolist() == [1.0, 1.0]
        client.close()


def test_servers_of_different_models_are_refused() -> None:
    other = STATUS | {"reward": REWARD | {"mean": [0.0, 0.5]}}
    with (
        lying({"status": {"status": STATUS}}) as one,
        lying({"status": {"status": other}}) as two,
        RewardClient(one, others=[two.url]) as client,
        pytest.raises(ServerError, match=r"the server at grpc://.* does not fit: reward is .*0\.5.* expected"),
    ):
        client.connect({})


def test_an_answer_in_parts_ends_when_one_of_them_is_given_up() -> None:
    parts: list[futures.Future[dict[str, Any]]] = [futures.Future(), futures.Future()]
    whole = _joined(parts, lambda outputs: outputs)
    parts[0].cancel()  # as the client does when it is closed
    parts[1].set_result({"values": np.zeros((1, 2), np.float32)})
    with pytest.raises(futures.CancelledError):
        whole.result(timeout=5)
