"""Hugging Face directories become Megatron checkpoints and jobs, and checkpoints become directories, bit by bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from hf_models import (
    FAMILIES,
    VOCABULARY,
    batch,
    edit_config,
    random_model,
    same_tensors,
    save,
    tensors_of,
    transformers_logits,
)
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from nemo_eppo.cli import main
from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import Tokenizer
from nemo_eppo.megatron import checkpoint
from nemo_eppo.megatron.runtime import initialize
from nemo_eppo.models import checkpoint_files
from nemo_eppo.settings.model import ModelSetup, ParallelConfig
from nemo_eppo.tools.convert import HfToMegatron, MegatronToHf
from nemo_eppo.training.reward_service import RewardModel
from nemo_eppo.training.setup import build, plan

TP2 = ParallelConfig(tensor_model_parallel_size=2)
PP2 = ParallelConfig(pipeline_model_parallel_size=2)
LAYOUTS = {"one rank": (ParallelConfig(), 1), "TP2": (TP2, 2), "PP2": (PP2, 2)}


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One directory per family, saved by transformers in several shards."""
    root = tmp_path_factory.mktemp("hf")
    return {family: save(random_model(family), root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def checkpoints(directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same models as checkpoints."""
    root = tmp_path_factory.mktemp("checkpoints")
    converted = {family: root / family for family in FAMILIES}
    for family, source in directories.items():
        HfToMegatron(source, converted[family]).run()
    return converted


def megatron_logits(sources: dict[str, Path], parallel: ParallelConfig) -> dict[str, Tensor]:
    """This rank's vocabulary shard of the logits [4, 10, V / tp] of each model."""
    initialize(parallel, seed=0)
    logits = {}
    for family, source in sources.items():
        model = plan(ModelSetup(restore_from_path=source, parallel=parallel))
        runner = build(model, "lm")
        tp = parallel.tensor_model_parallel_size
        logits[family] = runner.infer(*batch(), outputs=model.model.padded_vocab_size(tp) // tp)[0]
    return logits


# that checkpoints are read alike on one rank and in pipeline stages is shown bit for bit below
@pytest.mark.parametrize(
    ("source", "layout"),
    [
        pytest.param(source, layout, marks=[pytest.mark.slow] * (source == "checkpoints" and layout != "TP2"))
        for source in ("directories", "checkpoints")
        for layout in LAYOUTS
    ],
)
def test_logits_are_those_of_transformers(source: str, layout: str, request: pytest.FixtureRequest) -> None:
    parallel, ranks = LAYOUTS[layout]
    parts = run_ranks(megatron_logits, ranks, request.getfixturevalue(source), parallel)
    for family in FAMILIES:
        shards = parts if parallel.tensor_model_parallel_size > 1 else parts[:1]
        logits = torch.cat([part[family] for part in shards], dim=-1)[..., :VOCABULARY]
        expected = transformers_logits(random_model(family))
        assert max(float(row.abs().max()) for row in expected) > 0.5
        for ours, theirs in zip(logits, expected, strict=True):
            torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=0, atol=1e-5)


def resave(sources: dict[str, Path], parallel: ParallelConfig, targets: dict[str, Path]) -> None:
    initialize(parallel, seed=0)
    for family, source in sources.items():
        planned = plan(ModelSetup(restore_from_path=source, parallel=parallel))
        assert planned.manifest is not None
        checkpoint.save(targets[family], build(planned, "lm"), planned.manifest, planned.tokenizer_path)


def contents(directory: Path) -> dict[str, Any]:
    """Name, dtype and shape of what a checkpoint of one rank holds."""
    found = FileSystemReader(directory / "weights").read_metadata().state_dict_metadata
    return {
        key: (meta.size, meta.properties.dtype) if isinstance(meta, TensorStorageMetadata) else None
        for key, meta in found.items()
    }


@pytest.mark.parametrize("layout", ["one rank", "TP2", "PP2"])
def test_checkpoints_of_training_jobs_are_read_and_written_alike(
    layout: str, directories: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    parallel, ranks = LAYOUTS[layout]
    # biases and tied embeddings; norms of query and key; norms after; fused tensors
    families = ("Qwen2", "Qwen3", "Gemma2", "Phi3")
    saved = {family: tmp_path / family for family in families}
    run_ranks(resave, ranks, {family: checkpoints[family] for family in families}, parallel, saved)
    for family in families:
        MegatronToHf(saved[family], tmp_path / f"{family}-back").run()
        same_tensors(tmp_path / f"{family}-back", directories[family])
        if layout == "one rank":
            assert contents(saved[family]) == contents(checkpoints[family])


def test_round_trip_is_bit_exact(directories: dict[str, Path], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for family, original in directories.items():
        MegatronToHf(checkpoints[family], tmp_path / family, max_shard_bytes=20_000).run()
        same_tensors(tmp_path / family, original)
        assert len(list((tmp_path / family).glob("model-*-of-*.safetensors"))) > 1
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / family / file).read_bytes() == (original / file).read_bytes()
        ours, theirs = (AutoConfig.from_pretrained(directory).to_dict() for directory in (tmp_path / family, original))
        for key in theirs.keys() - {"_name_or_path", "head_dim"}:  # a width that a null means may be written out
            assert ours.get(key) == theirs.get(key), (family, key)
        network = AutoModelForCausalLM.from_pretrained(tmp_path / family, attn_implementation="eager")
        for got, expected in zip(transformers_logits(network), transformers_logits(random_model(family)), strict=True):
            assert torch.equal(got, expected), family


def test_a_llama_model_may_be_written_with_the_tensors_of_phi3(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    MegatronToHf(checkpoints["Llama"], tmp_path / "phi3", architecture="Phi3ForCausalLM").run()
    assert any("qkv_proj" in name for name in tensors_of(tmp_path / "phi3"))
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "phi3", attn_implementation="eager")
    for got, expected in zip(transformers_logits(network), transformers_logits(random_model("Llama")), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_checkpoint_keeps_the_tokenizer_and_not_the_model_beside_it(checkpoints: dict[str, Path]) -> None:
    files = {path.name for path in (checkpoints["Llama"] / checkpoint_files.TOKENIZER).iterdir()}
    assert files == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    checkpoint_files.verify(checkpoints["Llama"])


def test_settings_of_generation_come_along_and_end_with_the_tokenizers_eos(tmp_path: Path) -> None:
    source = save(random_model("Llama"), tmp_path / "hf")
    for name, ends, expected in (("kept", [5, 0], [5, 0]), ("added", 5, [0, 5]), ("absent", None, [0])):
        settings = {"temperature": 0.6, "do_sample": True, "eos_token_id": ends}
        (source / "generation_config.json").write_text(json.dumps(settings))
        HfToMegatron(source, tmp_path / f"{name}-megatron").run()
        MegatronToHf(tmp_path / f"{name}-megatron", tmp_path / name).run()
        found = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert found == settings | {"eos_token_id": expected}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "added").generation_config.eos_token_id == [0, 5]


def narrow_round_trip(root: Path) -> None:
    for name in ("bfloat16", "float16"):
        save(random_model("Qwen2", dtype=getattr(torch, name)), root / name)
        HfToMegatron(root / name, root / f"{name}-megatron").run()
    MegatronToHf(root / "bfloat16-megatron", root / "bfloat16-back").run()
    MegatronToHf(root / "float16-megatron", root / "float16-back", precision="fp16").run()


def test_bf16_and_fp16_models_keep_every_bit(tmp_path: Path) -> None:
    narrow_round_trip(tmp_path)
    assert checkpoint_files.stored_precision(tmp_path / "bfloat16-megatron") == "bf16"
    assert checkpoint_files.stored_precision(tmp_path / "float16-megatron") == "fp32"
    for name in ("bfloat16", "float16"):
        same_tensors(tmp_path / f"{name}-back", tmp_path / name)
        assert json.loads((tmp_path / f"{name}-back" / "config.json").read_text())["torch_dtype"] == name
    logits = run_ranks(megatron_logits, 1, {"Qwen2": tmp_path / "bfloat16-megatron"}, ParallelConfig())[0]["Qwen2"]
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype=torch.float32)
    for ours, theirs in zip(logits, transformers_logits(network), strict=True):
        shown = ours[: len(theirs), : theirs.size(1)]  # without the vocabulary's padding
        torch.testing.assert_close(shown, theirs, rtol=0, atol=1e-5)  # a bf16 checkpoint in an fp32 job


def too_large_for_fp16(root: Path) -> str:
    network = random_model("Llama")
    network.model.norm.weight.data[0] = 1e6
    save(network, root / "hf")
    HfToMegatron(root / "hf", root / "megatron").run()
    with pytest.raises(ConfigError) as error:
        MegatronToHf(root / "megatron", root / "back", precision="fp16").run()
    assert {path.name for path in root.iterdir()} == {"hf", "megatron"}
    return str(error.value)


def test_an_overflow_stops_and_leaves_no_directory(tmp_path: Path) -> None:
    assert "model.norm.weight is not finite in fp16: largest |value| 1e+06" in too_large_for_fp16(tmp_path)


def test_an_altered_checkpoint_is_not_exported(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    HfToMegatron(directories["Llama"], tmp_path / "megatron").run()
    file = max((tmp_path / "megatron" / "weights").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    command = ["convert", "megatron-to-hf", "--input", str(tmp_path / "megatron"), "--output", str(tmp_path / "back")]
    assert main(command) == 2
    assert f"is damaged: the content of weights/{file.name}" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_ctrl_c_leaves_nothing_of_a_conversion(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files, "copy_tokenizer", interrupt)  # what is done last
    command = ["convert", "hf-to-megatron", "--input", str(directories["Llama"]), "--output", str(tmp_path / "out")]
    assert main(command) == 130
    assert capsys.readouterr().err.endswith("nemo-eppo: interrupted\n")
    assert not list(tmp_path.iterdir())


def reward_round_trip(root: Path) -> list[Tensor]:
    """Raw and standardised scores of a trained reward model's checkpoint, and of its exported directory."""
    from nemo_eppo.megatron.model import unwrap

    HfToMegatron(root / "hf", root / "trained").run()
    initialize(ParallelConfig(), seed=0)
    trained = plan(ModelSetup(restore_from_path=root / "trained"), head="scalar")
    runner = build(trained, "scalar")
    unwrap(runner.chunks[0]).head.bias.data.fill_(0.75)  # as training leaves one
    assert trained.manifest is not None
    checkpoint.save(root / "biased", runner, trained.manifest, trained.tokenizer_path)
    MegatronToHf(root / "biased", root / "back").run()
    scores = []
    for name in ("biased", "back"):
        initialize(ParallelConfig(), seed=0)
        served = RewardModel(ModelSetup(restore_from_path=root / name))
        served.build()
        tokens, lengths = batch()
        raw = served.infer({"tokens": tokens, "lengths": lengths, "prompt_lengths": torch.ones(4, dtype=torch.long)})
        [mean], [std] = (served.statistics[name] for name in ("mean", "std"))
        scores += [raw["rewards"][:, 0], (raw["rewards"][:, 0] - mean) / std]
    return scores


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi3"])
def test_reward_models_become_sequence_classification_models(family: str, tmp_path: Path) -> None:
    original = random_model(family, scores=1)
    save(original, tmp_path / "hf")
    edit_config(tmp_path / "hf", nemo_eppo_reward={"mean": 0.5, "std": 2.0})
    raw, standardised, exported_raw, exported = run_ranks(reward_round_trip, 1, tmp_path)[0]
    torch.testing.assert_close(exported, standardised, rtol=0, atol=1e-5)
    torch.testing.assert_close(exported_raw, raw - 0.75, rtol=0, atol=1e-5)
    same_tensors(tmp_path / "back", tmp_path / "hf")  # no bias, which transformers would ignore
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    tokens, lengths = batch()
    padded = torch.where(torch.arange(10) < lengths[:, None], tokens, 1)
    for model in (network, original):
        scores = model(padded, attention_mask=(padded != 1).long()).logits
        assert scores.shape == (4, 1)
        torch.testing.assert_close(scores[:, 0], exported_raw, rtol=0, atol=1e-5)


def test_a_reward_directory_without_statistics_is_no_reward_model(tmp_path: Path) -> None:
    directory = save(random_model("Llama", scores=1), tmp_path / "hf")
    with pytest.raises(ConfigError, match=r'config.json has no nemo_eppo_reward.*add "nemo_eppo_reward": \{"mean"'):
        RewardModel(ModelSetup(restore_from_path=directory))
    with pytest.raises(ConfigError, match="holds a LlamaForSequenceClassification, expected head 'lm'"):
        plan(ModelSetup(restore_from_path=directory), head="lm")
    HfToMegatron(directory, tmp_path / "megatron").run()
    with pytest.raises(ConfigError, match=r"no mean, std: .*, or a sequence classifier without nemo_eppo_reward"):
        MegatronToHf(tmp_path / "megatron", tmp_path / "back")
    edit_config(directory, nemo_eppo_reward={"mean": 0.0, "std": 0.0})
    with pytest.raises(ConfigError, match="std = 0"):
        RewardModel(ModelSetup(restore_from_path=directory))


def critic_from_language_model(source: Path) -> list[bool]:
    initialize(ParallelConfig(), seed=0)
    critic = build(plan(ModelSetup(restore_from_path=source)), "scalar")
    from nemo_eppo.megatron.weights import export_tensors

    ours, theirs = dict(export_tensors(critic.chunks, plan(critic_setup(source)).model)), tensors_of(source)
    return [bool(ours["score.weight"].any()), *(torch.equal(ours[n], theirs[n]) for n in ours if n in theirs)]


def critic_setup(source: Path) -> ModelSetup:
    return ModelSetup(restore_from_path=source)


def test_a_critic_may_start_from_a_language_model(directories: dict[str, Path]) -> None:
    same = run_ranks(critic_from_language_model, 1, directories["Qwen3"])[0]
    assert len(same) > 20
    assert all(same)


def broken(tmp_path: Path, what: str) -> Path:
    directory = save(random_model("Llama"), tmp_path / "hf")
    shards = sorted(directory.glob("model-*.safetensors"))
    if what == "architecture":
        edit_config(directory, architectures=["GemmaForCausalLM"])
    elif what == "missing shard":
        shards[1].unlink()
    elif what == "truncated shard":
        shards[1].write_bytes(shards[1].read_bytes()[:-4])
    elif what == "no weights":
        for file in directory.glob("model*"):
            file.unlink()
    elif what == "config":
        (directory / "config.json").write_text("{")
    elif what == "tokenizer":
        for file in directory.glob("tokenizer*"):
            file.unlink()
    elif what == "small vocabulary":
        return save(random_model("Llama"), directory)
    else:
        for file in directory.glob("model*"):
            file.unlink()
        tensors = random_model("Llama").state_dict()
        if what == "missing tensors":
            del tensors["model.norm.weight"], tensors["lm_head.weight"]
        elif what == "misshapen tensor":
            tensors["model.norm.weight"] = torch.ones(31)
        elif what == "unknown tensor":
            tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
        elif what == "integers":
            tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
        save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("architecture", "'GemmaForCausalLM' is not supported; expected one of: LlamaForCausalLM"),
        ("missing shard", "lacks model-00002-of-"),
        ("truncated shard", "is damaged or no safetensors file"),
        ("no weights", "lacks model.safetensors (expected model.safetensors, or model.safetensors.index.json"),
        ("config", "config.json cannot be read"),
        ("tokenizer", "cannot be loaded: it has no tokenizer.json, *.model or vocab.*"),
        ("missing tensors", "model.norm.weight: expected (32,), found no such tensor"),
        ("missing tensors", "lm_head.weight: expected (67, 32), found no such tensor"),
        ("misshapen tensor", "model.norm.weight: expected (32,), found (31,)"),
        ("unknown tensor", "q_proj.bias: (32,), which LlamaForCausalLM does not have"),
        ("integers", "model.norm.weight: stored as I8; expected one of F32, BF16, F16"),
    ],
)
def test_what_cannot_be_converted_is_one_message(
    what: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = broken(tmp_path, what), tmp_path / "out"
    assert main(["convert", "hf-to-megatron", "--input", str(source), "--output", str(output)]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message
    assert not output.exists()
    with pytest.raises(ConfigError):
        plan(ModelSetup(restore_from_path=source))


def test_wrong_sources_and_outputs_are_one_message(
    checkpoints: dict[str, Path], directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama, target = str(checkpoints["Llama"]), str(tmp_path / "out")
    for command, said in (
        (["megatron-to-hf", "--input", llama, "--output", str(tmp_path)], f"--output: {tmp_path} already exists"),
        (["megatron-to-hf", "--input", str(tmp_path), "--output", target], "is no checkpoint and holds none"),
        (["megatron-to-hf", "--input", llama, "--output", target, "--architecture", "Qwen2ForCausalLM"], "qkv_bias"),
        (["hf-to-megatron", "--input", str(tmp_path / "x"), "--output", target], "config.json cannot be read"),
    ):
        assert main(["convert", *command]) == 2
        assert said in capsys.readouterr().err


def test_the_commands_convert_there_and_back(directories: dict[str, Path], tmp_path: Path) -> None:
    for way, source, target in (
        ("hf-to-megatron", directories["Qwen3"], "there"),
        ("megatron-to-hf", tmp_path / "there", "back"),
    ):
        assert main(["convert", way, "--input", str(source), "--output", str(tmp_path / target)]) == 0
    same_tensors(tmp_path / "back", directories["Qwen3"])
    assert [file.name for file in (tmp_path / "back").glob("*.safetensors")] == ["model.safetensors"]
    assert Tokenizer.from_directory(tmp_path / "back").vocab_size == 61
