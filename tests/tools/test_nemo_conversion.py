"""Models of NeMo become checkpoints: what Megatron-core's own modules compute, in NeMo's names, is computed here."""

import pickle
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed import run_ranks
from hf_models import WORDS, batch
from nemo_models import LLAMA, MODELS, ROWS, make_bf16, make_nemo, resave
from tiny import PP2, TP2
from torch import Tensor
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardedProperties
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_eppo.cli import main
from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import word_level
from nemo_eppo.megatron.checkpoint_weights import read_weights
from nemo_eppo.megatron.runtime import initialize
from nemo_eppo.models import checkpoint_files
from nemo_eppo.settings.model import ModelConfig, ModelSetup, ParallelConfig, RopeScaling
from nemo_eppo.tools.convert import NemoToMegatron
from nemo_eppo.tools.nemo_config import nemo_model_config
from nemo_eppo.training.reward_service import RewardModel
from nemo_eppo.training.setup import build, plan


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The directory of all models, and their results."""
    root = tmp_path_factory.mktemp("nemo")
    (results,) = run_ranks(make_nemo, 1, root)
    word_level(WORDS, root / "tokenizer")
    return root, results


def packed(directory: Path, target: Path) -> Path:
    """The .nemo file of a directory."""
    with tarfile.open(target, "w:") as archive:
        archive.add(directory, arcname=".")
    return target


def results_here(root: Path, names: list[str]) -> dict[str, Tensor]:
    initialize(ParallelConfig(), seed=0)
    results = {}
    for name in names:
        planned = plan(ModelSetup(restore_from_path=root / name))
        head = planned.manifest.head if planned.manifest else "lm"
        outputs = planned.model.padded_vocab_size(1) if head == "lm" else 1
        results[name] = build(planned, head).infer(*batch(), outputs=outputs)[0]
    return results


def test_results_are_those_of_the_original_modules(made: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    root, expected = made
    lengths = batch()[1].tolist()
    for name in MODELS:
        archive = packed(root / name, tmp_path / f"{name}.nemo")
        NemoToMegatron(archive, root / "tokenizer", tmp_path / name).run()
    (found,) = run_ranks(results_here, 1, tmp_path, list(MODELS))
    for name, theirs in expected.items():
        ours = found[name] if name != "reward" else found[name].squeeze(-1)
        assert theirs.abs().max() > 0.5
        for row, length in enumerate(lengths):
            torch.testing.assert_close(ours[row, :length], theirs[row, :length], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", [TP2, PP2], ids=["TP2", "PP2"])
def test_checkpoints_of_several_ranks_and_with_an_optimizer_hold_the_same(
    layout: dict[str, int], made: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    root, _ = made
    run_ranks(resave, 2, root, tmp_path / "nemo", layout)
    for name in ("llama", "qwen2"):
        for source, target in ((root, "one"), (tmp_path / "nemo", "two")):
            NemoToMegatron(source / name, root / "tokenizer", tmp_path / target / name).run()
        one, two = (weights(tmp_path / target / name) for target in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())


def weights(directory: Path) -> dict[str, Tensor]:
    manifest = checkpoint_files.verify(directory)
    return dict(read_weights(directory / "weights", manifest.model, None if manifest.head == "lm" else 1))


def test_bf16_models_stay_narrow_with_an_fp32_head(made: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    (expected,) = run_ranks(make_bf16, 1, tmp_path)
    NemoToMegatron(tmp_path / "reward", made[0] / "tokenizer", tmp_path / "narrow").run()
    NemoToMegatron(tmp_path / "reward", made[0] / "tokenizer", tmp_path / "wide", "fp32").run()
    assert [checkpoint_files.stored_precision(tmp_path / name) for name in ("narrow", "wide")] == ["bf16", "fp32"]
    found = weights(tmp_path / "narrow")
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def edited(source: Path, target: Path, **changes: Any) -> Path:
    """The same model with another model_config.yaml."""
    shutil.copytree(source, target)
    config = yaml.safe_load((source / "model_config.yaml").read_text())
    (target / "model_config.yaml").write_text(yaml.safe_dump(config | changes))
    return target


def test_reward_models_keep_their_statistics_and_critics_have_none(
    made: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    root, _ = made
    standardised = {"reward_standardization": {"enable": True, "mean": 1.5, "std": 2.5}}
    for name, changes in (("raw", {}), ("standard", standardised), ("critic", {"output_sequence": True})):
        source = edited(root / "reward", tmp_path / f"{name}-nemo", **changes)
        arguments = ["--tokenizer", str(root / "tokenizer"), "--output", str(tmp_path / name)]
        assert main(["convert", "nemo-to-megatron", "--input", str(source), *arguments]) == 0
    for name, mean, std in (("raw", 0.0, 1.0), ("standard", 1.5, 2.5)):
        statistics = RewardModel(ModelSetup(restore_from_path=tmp_path / name)).statistics
        assert (statistics["mean"], statistics["std"]) == ([mean], [std])
    with pytest.raises(ConfigError, match="it is a critic"):
        RewardModel(ModelSetup(restore_from_path=tmp_path / "critic"))
    manifest = checkpoint_files.read_manifest(tmp_path / "critic")
    assert manifest.model == ModelConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=ROWS,
        max_sequence_length=64,
        norm_epsilon=1e-6,
    )


PLAIN = {key: value for key, value in LLAMA.items() if key not in ("data", "max_position_embeddings")}


def test_positions_are_stretched_as_the_settings_say() -> None:
    stretched = nemo_model_config(PLAIN | {"scale_positional_embedding": True, "scale_factor": 32}, ROWS, "lm")
    assert stretched.rope_scaling == RopeScaling(
        rope_type="llama3", factor=32, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192
    )
    both = PLAIN | {"scale_positional_embedding": True, "seq_len_interpolation_factor": 8.0}
    with pytest.raises(ConfigError, match="stretches positions twice"):
        nemo_model_config(both, ROWS, "lm")
    linear = nemo_model_config(both, ROWS, "scalar").rope_scaling
    assert linear == RopeScaling(rope_type="linear", factor=8.0), "NeMo-Aligner's reward models have that one alone"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"mcore_gpt": False}, "mcore_gpt = False: expected True"),
        ({"bias": True}, "bias = True: expected False"),
        ({"normalization": "layernorm1p"}, "normalization = 'layernorm1p': expected 'rmsnorm'"),
        ({"activation": "fast-geglu"}, "activation = 'fast-geglu': expected 'fast-swiglu'"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type = 'learned_absolute': expected"),
        ({"rotary_percentage": 0.5}, "rotary_percentage = 0.5: expected 1.0"),
        ({"num_moe_experts": 8}, "num_moe_experts = 8: expected None"),
        ({"name": "megatron_gemma2"}, "name = 'megatron_gemma2': expected '' or 'te_gpt'"),
        ({"apply_embedding_scaling": True}, "apply_embedding_scaling = True: expected False"),
        ({"mcore_customization_config.window_size": 3}, "mcore_customization_config.window_size = 3: expected nothing"),
        ({"window_size": [3, 3]}, "window_size = [3, 3]: expected null, or a number of tokens before"),
        ({"reward_model_type": "regression"}, "reward_model_type = 'regression': expected 'binary_ranking'"),
        ({"use_avg_pool": True}, "use_avg_pool = True: expected False"),
        ({"hidden_size": None}, "hidden_size: required, but not set"),
        ({"num_attention_heads": None, "kv_channels": 12}, "num_attention_heads: required, but not set"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not divisible by num_attention_heads 5"),
    ],
)
def test_a_setting_that_makes_another_model_is_refused_by_its_name(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        nemo_model_config(PLAIN | changes, ROWS, "scalar")
    assert complaint in str(error.value)


def test_a_setting_that_is_absent_has_nemos_default() -> None:
    absent = {key: value for key, value in PLAIN.items() if key not in ("bias", "normalization")}
    with pytest.raises(ConfigError) as error:
        nemo_model_config(absent, ROWS, "lm")
    assert "bias = True (the file does not set it: NeMo's default): expected False" in str(error.value)
    assert "normalization = 'layernorm' (the file" in str(error.value)


@contextmanager
def metadata_of(directory: Path) -> Iterator[Any]:
    """What a directory of weights says of its arrays, to be changed."""
    path = directory / "model_weights" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    yield metadata
    path.write_bytes(pickle.dumps(metadata))


def test_checkpoints_of_older_torch_are_read(made: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    source = edited(made[0] / "llama", tmp_path / "older")
    with metadata_of(source) as metadata:
        for array in metadata.state_dict_metadata.values():
            if isinstance(array, TensorStorageMetadata):
                array.properties = ShardedProperties(array.properties.dtype)  # type: ignore[assignment]
    for directory, name in ((made[0] / "llama", "new"), (source, "old")):
        NemoToMegatron(directory, made[0] / "tokenizer", tmp_path / name).run()
    new, old = (weights(tmp_path / name) for name in ("new", "old"))
    assert all(torch.equal(tensor, old[key]) for key, tensor in new.items())


def test_whoever_gives_a_job_a_nemo_model_is_told_how_to_convert_it(
    made: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    for path in (made[0] / "llama", packed(made[0] / "llama", tmp_path / "llama.nemo")):
        with pytest.raises(ConfigError, match=r"holds none .*; `nemo-eppo convert nemo-to-megatron` makes one"):
            plan(ModelSetup(restore_from_path=path))


def test_arrays_that_are_missing_other_or_left_over_are_named(
    made: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    source = edited(made[0] / "llama", tmp_path / "nemo", num_query_groups=4)
    with metadata_of(source) as metadata:
        arrays, layer = metadata.state_dict_metadata, "model.decoder.layers.mlp"
        arrays[f"{layer}.adapter.weight"] = arrays.pop(f"{layer}.linear_fc2.weight")
    with pytest.raises(ConfigError) as error:
        NemoToMegatron(source, made[0] / "tokenizer", tmp_path / "out")
    assert str(error.value).splitlines()[1:] == [
        "  - model.decoder.layers.self_attention.linear_qkv.weight: expected (2, 96, 32), found (2, 64, 32)",
        "  - model.decoder.layers.mlp.linear_fc2.weight: expected (2, 32, 48), found no such array",
        "  - model.decoder.layers.mlp.adapter.weight, which this model does not have",
    ]


def test_other_formats_are_refused_with_what_makes_them_readable(
    made: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    def refusal(source: Path, tokenizer: Path = made[0] / "tokenizer") -> str:
        with pytest.raises(ConfigError) as error:
            NemoToMegatron(source, tokenizer, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(error.value)

    zarr = edited(made[0] / "llama", tmp_path / "zarr")
    (zarr / "model_weights" / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    assert "stored as 'zarr': expected 'torch_dist'. Restore the model in NeMo 2.0 or" in refusal(zarr)
    shutil.rmtree(zarr / "model_weights")
    assert "has no model_weights/, one of Megatron-core's" in refusal(packed(zarr, tmp_path / "old.nemo"))
    (zarr / "model_config.yaml").unlink()
    assert "has no model_config.yaml: expected a model of NeMo 1.x" in refusal(zarr)
    broken = edited(made[0] / "llama", tmp_path / "broken")
    (broken / "model_weights" / ".metadata").write_bytes(b"no pickle")
    assert refusal(packed(broken, tmp_path / "b.nemo")).startswith(
        f"{tmp_path / 'b.nemo'}/model_weights/.metadata cannot"
    )
    (tmp_path / "text.nemo").write_text("no archive")
    assert "expected a directory or a .nemo file, which is a tar archive" in refusal(tmp_path / "text.nemo")
    assert refusal(tmp_path / "none.nemo") == f"--input: {tmp_path / 'none.nemo'} does not exist"
    word_level([f"w{n}" for n in range(80)], tmp_path / "large")
    assert "the tokenizer has 82 tokens, the model 72" in refusal(made[0] / "llama", tmp_path / "large")
    link = edited(made[0] / "llama", tmp_path / "link")
    (link / "model_weights" / ".metadata").unlink()
    (link / "model_weights" / ".metadata").symlink_to("/etc/hostname")
    assert "is a link to an absolute path" in refusal(packed(link, tmp_path / "link.nemo"))
