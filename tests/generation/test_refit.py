"""No refit passes that is not exactly the one expected, and one that passes is the actor's weights bit for bit."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from engines import STAND_IN, stand_in, trtllm_engine
from small_models import (
    EOS,
    GEMMA2_MODEL,
    LAYOUTS,
    MISTRAL_MODEL,
    MODEL,
    build_engine,
    build_policy,
    random_prompts,
    random_weights,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_eppo.config import ConfigError
from nemo_eppo.generation import ipc
from nemo_eppo.generation.build import check_engine
from nemo_eppo.generation.refit import Bucket, Receiver, RefitError, TensorInfo, describe, digest, pack
from nemo_eppo.generation.trtllm_checks import check_tensorrt_llm
from nemo_eppo.generation.trtllm_engine import map_sampling
from nemo_eppo.megatron import lora
from nemo_eppo.megatron.lora import AdaptersOff
from nemo_eppo.megatron.weights import export_tensors
from nemo_eppo.models.hf_config import hf_config
from nemo_eppo.models.hf_names import hf_names
from nemo_eppo.settings.generation import EngineConfig, SamplingParams, TensorRTLLMConfig
from nemo_eppo.settings.model import LoRAConfig, ModelConfig, ParallelConfig

sys.path.append(str(STAND_IN))
from memory_account import Account

GREEDY = SamplingParams(max_new_tokens=8, greedy=True)
PROMPTS = random_prompts([7, 3, 12])
TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(300), "c": torch.arange(5).bfloat16(), "d": torch.ones(3)}

Arrived = list[tuple[str, Tensor]]


def sent(version: int, split: int = 2) -> list[tuple[Bucket, Arrived]]:
    """The buckets of one refit."""
    parts = [list(TENSORS.items())[:split], list(TENSORS.items())[split:]]
    arrived = [[(name, tensor.clone()) for name, tensor in part] for part in parts]
    return [(Bucket(version, number, describe(part)), part) for number, part in enumerate(arrived)]


def receive(receiver: Receiver, version: int, buckets: list[tuple[Bucket, Arrived]]) -> None:
    receiver.begin(version)
    for header, tensors in buckets:
        receiver.expect(header)
        receiver.check(header, [describe(tensors)])
    receiver.finish(version)


def flip_a_bit(buckets: list[tuple[Bucket, Arrived]]) -> None:
    buckets[1][1][0][1].view(torch.int16)[2] ^= 1


def swap_names(buckets: list[tuple[Bucket, Arrived]]) -> None:
    (header, tensors) = buckets[0]
    buckets[0] = (header._replace(tensors=header.tensors[::-1]), tensors[::-1])


def swap_values(buckets: list[tuple[Bucket, Arrived]]) -> None:
    values = buckets[0][1][0][1].view(-1)
    values[[1, 4]] = values[[4, 1]]


def of_another_version(buckets: list[tuple[Bucket, Arrived]]) -> None:
    buckets[1] = sent(4)[1]


def with_another_shape(buckets: list[tuple[Bucket, Arrived]]) -> None:
    changed = [("a", TENSORS["a"].view(3, 2)), ("b", TENSORS["b"])]
    buckets[0] = (Bucket(5, 0, describe(changed)), changed)


def with_a_foreign_tensor(buckets: list[tuple[Bucket, Arrived]]) -> None:
    changed = [("a", TENSORS["a"]), ("x", TENSORS["b"])]
    buckets[0] = (Bucket(5, 0, describe(changed)), changed)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda buckets: buckets.pop(), "incomplete refit of version 5: ended after 2 of 4 tensors, c is missing"),
        (lambda buckets: buckets.pop(0), "incomplete refit of version 5: bucket 1 arrived, expected bucket 0"),
        (lambda buckets: buckets.insert(1, buckets[0]), "reordered refit of version 5: bucket 0 arrived"),
        (swap_names, "reordered or incomplete refit of version 5: b arrived, expected a"),
        (of_another_version, "stale refit: a bucket of version 4 while version 5 is being received"),
        (flip_a_bit, "corrupted refit of version 5: c has digest"),
        (swap_values, "corrupted refit of version 5: a has digest"),
        (with_another_shape, "refit of version 5: a is torch.float32 (3, 2), expected torch.float32 (2, 3)"),
        (with_a_foreign_tensor, "foreign tensor in the refit of version 5: x arrived, expected b"),
    ],
)
def test_each_kind_of_damage_is_detected_and_leaves_no_weights(
    damage: Callable[[list[tuple[Bucket, Arrived]]], Any], message: str
) -> None:
    receiver = Receiver(describe(list(TENSORS.items())))
    receive(receiver, 3, sent(3))
    assert receiver.version == 3
    buckets = sent(5)
    damage(buckets)
    with pytest.raises(RefitError, match=re.escape(message)):
        receive(receiver, 5, buckets)
    assert receiver.version is None
    with pytest.raises(RefitError, match="stale refit: version 5 after version 5"):
        receiver.begin(5)
    receive(receiver, 6, sent(6, split=3))
    assert receiver.version == 6


def test_every_copy_of_a_bucket_is_checked() -> None:
    receiver, ((header, tensors), _) = Receiver(describe(list(TENSORS.items()))), sent(0)
    damaged = [(name, tensor.clone()) for name, tensor in tensors]
    damaged[1][1][299] = 2
    receiver.begin(0)
    with pytest.raises(RefitError, match="corrupted refit of version 0: b has digest"):
        receiver.check(header, [describe(tensors), describe(damaged)])


@pytest.mark.parametrize("size", [1, 3, 4096, 4097, 64 * 4096 + 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_digest_sees_every_changed_and_every_moved_element(size: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(size).to(dtype)
    digests = {int(digest(tensor))}
    places = sorted({0, size // 2, size - 1})
    for place in places:
        changed = tensor.clone()
        changed[place] = -changed[place]
        digests.add(int(digest(changed)))
    assert len(digests) == 1 + len(places)
    if size > 2:
        assert int(digest(tensor.roll(1))) not in digests
    assert int(digest(tensor.clone())) in digests


def test_packing_alternates_between_two_buffers_and_gives_every_tensor() -> None:
    tensors = {f"t{i}": torch.randn(size) for i, size in enumerate([300, 10, 10, 5000, 7, 200])}
    sizes: list[int] = []

    def allocate(size: int) -> Tensor:
        sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    names, found = [], {}
    before: list[tuple[str, Tensor, Tensor]] = []
    for bucket in pack(tensors.items(), 2048, allocate):
        assert all(torch.equal(place, tensors[name]) for name, _, place in before), "an engine still loads it"
        before = bucket
        names.append([name for name, _, _ in bucket])
        assert len({place.untyped_storage().data_ptr() for _, _, place in bucket}) == 1
        for name, value, place in bucket:
            found[name] = place.clone()
            assert int(value) == int(digest(place))
    assert names == [["t0", "t1", "t2"], ["t3"], ["t4", "t5"]]
    assert sizes == [2048, 20224]
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def transformers_greedy(weights: dict[str, Tensor]) -> list[list[int]]:
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config(MODEL, "LlamaForCausalLM"))).eval()
    network.load_state_dict(weights)
    responses = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        output = network.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        responses.append(output[0, len(prompt) :].tolist())
    return responses


def small_buckets(**environment: str) -> TensorRTLLMConfig:
    """1 byte: every tensor has a bucket of its own, or shares that of a larger one before it."""
    return stand_in(tensor_parallel_size=2, environment=environment).model_copy(update={"bucket_megabytes": 2**-20})


def damaged(weights: Iterator[tuple[str, Tensor]], kind: str) -> Iterator[tuple[str, Tensor]]:
    for index, (name, tensor) in enumerate(weights):
        if not (kind == "incomplete" and index == 9):
            yield ("model.norm.weight" if kind == "reordered" and index == 5 else name), tensor


def refit_a_split_actor(directory: Path) -> dict[str, Any]:
    """Updates of an actor of TP 2 and PP 2, some of them damaged, and what its two engines of TP 2 made of them."""
    chunks = build_policy(LAYOUTS["TP 2 PP 2"])
    engine = trtllm_engine(chunks, directory, config=small_buckets(STAND_IN_DUMP=str(directory)))
    found: dict[str, Any] = {"updates": []}

    def attempt(name: str, work: Callable[[], Any]) -> None:
        try:
            work()
            found[name] = "nothing was raised"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    attempt("before", lambda: engine.generate(PROMPTS, GREEDY, [0, 1, 2]))
    for version in (1, 2):
        engine.refit(export_tensors(chunks, MODEL), version)
        completions = engine.generate(PROMPTS, GREEDY, [0, 1, 2])
        if torch.distributed.get_rank() == 0:
            found["updates"].append(([torch.load(file) for file in directory.glob("*.pt")], completions))
        torch.distributed.barrier()
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(1.1)
    weights, handles = export_tensors, ipc.handles
    attempt("stale", lambda: engine.refit(weights(chunks, MODEL), 2))
    attempt("without weights", lambda: engine.generate(PROMPTS, GREEDY, [0, 1, 2]))
    for version, kind in ((3, "incomplete"), (4, "reordered")):
        source = list(weights(chunks, MODEL))
        attempt(kind, partial(engine.refit, damaged(iter(source), kind), version))

    def corrupt(named: list[tuple[str, Tensor]]) -> str:
        if torch.distributed.get_rank() == 3:  # the copy of one of the second engine's devices
            named[-1][1].view(-1)[-1] += 1
        return handles(named)

    ipc.handles = corrupt  # type: ignore[assignment]
    source = list(weights(chunks, MODEL))
    attempt("corrupted", lambda: engine.refit(iter(source), 5))
    ipc.handles = handles
    attempt("after a failure", lambda: engine.generate(PROMPTS, GREEDY, [0, 1, 2]))
    engine.refit(iter(source), 6)
    found["healed"] = {completion.weight_version for completion in engine.generate(PROMPTS, GREEDY, [0, 1, 2])}
    engine.close()
    return found


def test_an_actor_of_tp2_pp2_refits_tensor_by_tensor_and_no_damage_passes_on_any_rank(tmp_path: Path) -> None:
    ranks = run_ranks(refit_a_split_actor, 4, tmp_path)
    expected = random_weights(MODEL)
    for version, (engines, completions) in enumerate(ranks[0]["updates"], start=1):
        assert len(engines) == 2
        for weights in engines:
            assert set(weights) == {name for name, _ in hf_names(MODEL)}
            for name, tensor in weights.items():
                assert torch.equal(tensor, expected[name]), name
        assert [completion.token_ids for completion in completions] == transformers_greedy(expected)
        assert {completion.weight_version for completion in completions} == {version}
        expected = {name: tensor * 1.1 for name, tensor in expected.items()}
    for number, rank in enumerate(ranks):
        for kind, message in {
            "before": "the engine has no weights",
            "stale": "stale refit: version 2 after version 2",
            "without weights": "the engine has no weights",
            "incomplete": "reordered or incomplete refit of version 3",
            "reordered": "reordered or incomplete refit of version 4: model.norm.weight arrived",
            "corrupted": "corrupted refit of version 5",
            "after a failure": "the engine has no weights",
        }.items():
            talks = (2,) if kind == "corrupted" else (0, 2)  # ranks whose process refuses
            error = "RefitError: " if number in talks else f"PeerError: rank {talks[0]} failed: RefitError: "
            assert rank[kind].startswith(error + message), (number, kind, rank[kind])
        assert rank["healed"] == {6}


def fail_amid_a_refit(directory: Path) -> None:
    chunks = build_policy(LAYOUTS["TP 2"])
    engine = trtllm_engine(chunks, directory, config=small_buckets())

    def ends_on_rank_1() -> Iterator[tuple[str, Tensor]]:
        for index, named in enumerate(export_tensors(chunks, MODEL)):
            if index == 9 and torch.distributed.get_rank() == 1:
                raise MemoryError("no room for the next tensor")
            yield named

    engine.refit(ends_on_rank_1(), 1)


def test_a_rank_that_fails_amid_a_refit_does_not_wait_for_those_that_wait_for_it(tmp_path: Path) -> None:
    # its end is the job's, as torchrun ends all when one does
    with pytest.raises(RuntimeError, match=r"rank 1 failed:(\n.*)*MemoryError: no room for the next tensor"):
        run_ranks(fail_amid_a_refit, 2, tmp_path, timeout=60)


def held_after_the_start(directory: Path) -> dict[str, int]:
    account = Account(directory / "account", 10**9)
    config = stand_in(environment={"STAND_IN_MEMORY": str(directory / "account")})
    engine = trtllm_engine(build_policy({}), directory, config=config)
    held = account.held()
    engine.close()
    return held


def test_an_engine_that_has_started_sleeps(tmp_path: Path) -> None:
    assert run_ranks(held_after_the_start, 1, tmp_path) == [{}]


def refit_without_loading(directory: Path) -> list[str]:
    """What three refits raise of which the first has other weights, but for one, than an engine loads."""
    weights, said = random_weights(MODEL), []
    engine = trtllm_engine(build_policy({}), directory, config=stand_in(environment={"STAND_IN_SKIP": "model.norm"}))
    for version, factor in enumerate((1, 1, 1.001)):
        try:
            engine.refit(((name, tensor * factor) for name, tensor in weights.items()), version)
        except RefitError as error:
            said.append(str(error))
    engine.close()
    return said


def test_a_tensor_that_the_engine_was_given_and_did_not_load_is_named(tmp_path: Path) -> None:
    message = "refit of version 2: the engine did not load model.norm.weight into its model.norm.weight"
    assert run_ranks(refit_without_loading, 1, tmp_path) == [[message]]
    assert "is not checked" not in (tmp_path / "engine.log.0").read_text(), "each weight has a tensor of the engine"


def test_what_is_fused_and_split_is_watched_by_what_it_is_made_of() -> None:
    sizes = {f"0.{name}.weight": size for name, size in {"q_proj": 1, "k_proj": 2, "v_proj": 3, "up": 4}.items()}
    receiver = Receiver([TensorInfo(name, (size,), "torch.float32") for name, size in sizes.items()])

    def refit(version: int, changed: str, own: dict[str, list[float]]) -> list[str]:
        given = [(name, torch.full((size,), float(name == changed))) for name, size in sizes.items()]
        bucket = Bucket(version, 0, describe(given))
        receiver.begin(version)
        receiver.check(bucket, [bucket.tensors])
        receiver.finish(version)
        devices = zip(*own.values(), strict=True)
        return receiver.confirm(
            [describe([(n, torch.tensor([v])) for n, v in zip(own, d, strict=True)]) for d in devices]
        )

    assert refit(0, "", {"0.qkv_proj.weight": [0, 0]}) == ["0.up.weight"]
    refit(1, "0.k_proj.weight", {"0.qkv_proj.weight": [0, 1]})  # its rows are on the second device
    refit(2, "0.up.weight", {"0.qkv_proj.weight": [0, 0]})
    refit(3, "0.up.weight", {"0.qkv_proj.weight": [0, 0]})  # nothing is new
    with pytest.raises(RefitError, match="version 4: the engine did not load 0\\.v_proj"):
        refit(4, "0.v_proj.weight", {"0.qkv_proj.weight": [0, 0]})
    assert receiver.version is None


def answer_with_a_stale_cache(directory: Path) -> tuple[list[Any], str]:
    """Greedy answers before and after an update whose finalising keeps the prefix cache; then the process dies."""
    chunks = build_policy({})
    engine = trtllm_engine(chunks, directory, config=stand_in(environment={"STAND_IN_KEEP_PREFIXES": "1"}))
    weights = random_weights(MODEL)
    engine.refit(iter(weights.items()), 1)
    engine.generate(PROMPTS, GREEDY, [0, 1, 2])
    engine.refit(((name, tensor * 1.1) for name, tensor in weights.items()), 2)
    answers = engine.generate(PROMPTS, GREEDY, [0, 1, 2])
    assert engine._process is not None
    engine._process._process.kill()
    try:
        engine.generate(PROMPTS, GREEDY, [0, 1, 2])
    except Exception as error:
        return answers, f"{type(error).__name__}: {error}"
    return answers, "nothing was raised"


def test_a_prefix_cache_that_outlives_a_refit_would_show_and_a_dead_process_does(tmp_path: Path) -> None:
    answers, error = run_ranks(answer_with_a_stale_cache, 1, tmp_path)[0]
    right = transformers_greedy({name: tensor * 1.1 for name, tensor in random_weights(MODEL).items()})
    assert [answer.token_ids for answer in answers] != right, "the test above could not have failed"
    assert error.startswith("EngineProcessError: the engine's process ended at 'generate' with exit code -9")


def answer_with_adapters(directory: Path) -> dict[str, list[list[int]]]:
    """Greedy answers of both engines over an actor with adapters of TP 2, and over its reference."""
    chunks = build_policy(LAYOUTS["TP 2"])
    lora.train_adapters(chunks, LoRAConfig(rank=3, alpha=24))
    for adapter in lora.adapters(chunks):
        with torch.no_grad():
            adapter.b.copy_(torch.randn(adapter.b.shape, generator=torch.Generator().manual_seed(5)) * 0.3)
    found, version = {}, 0
    engines = {"megatron": build_engine(chunks), "tensorrt_llm": trtllm_engine(chunks, directory)}
    for kind, engine in engines.items():
        for who, weights in (("policy", nullcontext()), ("reference", AdaptersOff(chunks).active())):
            version += 1
            with weights:
                engine.refit(export_tensors(chunks, MODEL), version)
                completions = engine.generate(PROMPTS, GREEDY, [0, 1, 2])
            found[f"{who} {kind}"] = [completion.token_ids for completion in completions]
        engine.close()
    return found


def test_an_actor_with_adapters_refits_them_merged_and_its_reference_without(tmp_path: Path) -> None:
    found = run_ranks(answer_with_adapters, 2, tmp_path)[0]
    assert found["reference tensorrt_llm"] == found["reference megatron"] == transformers_greedy(random_weights(MODEL))
    assert found["policy tensorrt_llm"] == found["policy megatron"] != found["reference megatron"]


class Extended(SamplingParams):
    min_p: float = 0.1


def test_sampling_parameters_are_mapped_one_by_one() -> None:
    settings: dict[str, Any] = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1}
    sampling = SamplingParams(max_new_tokens=9, stop_strings=("<end>", "text"), **settings)
    expected = {"seed": 2**64 - 1, "max_tokens": 9, "stop_token_ids": [2, 1], **settings}
    assert map_sampling(sampling, -1, room=20, stop_ids=(2, 1)) == expected
    greedy = map_sampling(GREEDY, 3, room=4, stop_ids=(2,))
    plain = {"temperature": 1.0, "top_k": 1, "top_p": 1.0, "repetition_penalty": 1.0}
    assert greedy == {"seed": 3, "max_tokens": 4, "stop_token_ids": [2], **plain}
    with pytest.raises(ConfigError, match=r"generation.min_p = 0.1: TensorRT-LLM has no counterpart"):
        map_sampling(Extended(max_new_tokens=3), 0, room=9, stop_ids=(2,))


def test_a_shortest_length_is_refused_before_tensorrt_llm_is_looked_for() -> None:
    sampling = SamplingParams(max_new_tokens=3, min_new_tokens=2)
    with pytest.raises(ConfigError, match=r"generation.min_new_tokens = 2: .*expected 0, or engine.name = 'megatron'"):
        check_engine(EngineConfig(name="tensorrt_llm"), MODEL, ParallelConfig(), sampling)
    check_engine(EngineConfig(), MODEL, ParallelConfig(), sampling)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "has no package tensorrt_llm. Install tensorrt_llm 1.2 and ray 2.54 into an environment of their own"),
        ({"python": Path("/no/python")}, "tensorrt_llm.python = '/no/python' cannot be run"),
        ({"tensor_parallel_size": 4}, "tensor_parallel_size = 4: expected a divisor of 2, the ranks of a replica"),
    ],
)
def test_an_engine_that_cannot_start_is_refused_before_anything_does(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_tensorrt_llm(TensorRTLLMConfig(**settings), MODEL, parallel)
    check_tensorrt_llm(stand_in(tensor_parallel_size=2), MODEL, parallel)
    older = tmp_path / "tensorrt_llm-1.1.0.dist-info"
    older.mkdir()
    (older / "METADATA").write_text("Name: tensorrt_llm\nVersion: 1.1.0\n")
    with pytest.raises(ConfigError, match=r"has tensorrt_llm 1\.1\.0\. Install tensorrt_llm 1\.2 and ray 2\.54 into"):
        check_tensorrt_llm(TensorRTLLMConfig(environment={"PYTHONPATH": str(tmp_path)}), MODEL, parallel)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7c2a,GPU-91f0")
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES has to hold numbers, not GPU-7c2a"):
        check_tensorrt_llm(stand_in(tensor_parallel_size=2), MODEL, parallel)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (GEMMA2_MODEL.model_copy(update={"sliding_window": 64}), "Gemma2 models"),
        (MISTRAL_MODEL, "model.sliding_window = 3, model.rope_scaling.rope_type = 'linear'"),
    ],
)
def test_models_that_tensorrt_llm_is_not_known_to_compute_are_refused(model: ModelConfig, what: str) -> None:
    with pytest.raises(ConfigError, match=f"not known to compute {what} as training does; expected 'megatron'"):
        check_tensorrt_llm(stand_in(), model, ParallelConfig())


def test_an_engine_is_within_one_machine_and_a_replica_need_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "8")
    actor = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    check_tensorrt_llm(stand_in(tensor_parallel_size=2), MODEL, actor)
    with pytest.raises(ConfigError, match="which runs 4 ranks; ranks 0, 1, 4, 5 would make one"):
        check_tensorrt_llm(stand_in(tensor_parallel_size=4), MODEL.model_copy(update={"num_query_groups": 4}), actor)
