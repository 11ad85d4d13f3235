"""Bad checkpoints, Hugging Face directories and tokenizers; tried with SFT.

As rank 1: the way through NeMo is that of `test_bad_jobs`.
"""

from pathlib import Path

import pytest
from bad_input import Row, check, command, edited, other_tokenizer, removed, truncated, written

MODELS = [
    Row(
        "no such model",
        "model.restore_from_path=meta-llama/Llama-3.1-8B",
        r"model\.restore_from_path: meta-llama/Llama-3\.1-8B does not exist",
    ),
    Row(
        "a file",
        "model.restore_from_path=file",
        r"model\.restore_from_path: file is no checkpoint and holds none \(step_\*\)",
        {"file": "x"},
    ),
    Row(
        "an empty directory",
        "model.restore_from_path=empty",
        r"model\.restore_from_path: empty is no checkpoint and holds none \(step_\*\)",
        {"empty": None},
    ),
    Row(
        "a checkpoint with another head",
        "model.restore_from_path=rm",
        r"model\.restore_from_path: rm holds a model with head 'scalar', expected 'lm'",
    ),
    Row(
        "a truncated file of weights",
        "",
        r"model\.restore_from_path: sft is damaged: weights/__0_0\.distcp has 95503 bytes, its manifest says",
        change=("sft", truncated),
    ),
    Row(
        "a checkpoint without weights",
        "",
        r"model\.restore_from_path: sft is damaged: it has no weights/\.metadata, which its manifest lists",
        change=("sft", removed("weights")),
    ),
    Row(
        "a checkpoint without tokenizer",
        "",
        r"model\.restore_from_path: sft is damaged: it has no tokenizer/tokenizer\.json, which its manifest",
        change=("sft", removed("tokenizer")),
    ),
    Row(
        "a broken manifest",
        "",
        r"model\.restore_from_path: sft/manifest\.json cannot be read: not JSON \(Expecting property name",
        change=("sft", written("manifest.json", "{")),
    ),
    Row(
        "an empty manifest",
        "",
        r"model\.restore_from_path: sft/manifest\.json cannot be read: not JSON \(Expecting value: line 1 column",
        change=("sft", written("manifest.json", "")),
    ),
    Row(
        "a manifest that lacks the model",
        "",
        r"model\.restore_from_path: sft/manifest\.json cannot be read: invalid configuration: - model:",
        change=("sft", edited("manifest.json", model=None)),
    ),
    Row(
        "a manifest of a later version",
        "",
        r"model\.restore_from_path: sft/manifest\.json: format 9, this version reads format 1",
        change=("sft", edited("manifest.json", format=9)),
    ),
    Row(
        "a manifest that names files outside",
        "",
        r"model\.restore_from_path: sft/manifest\.json names '\.\./\.\./secret', which lies, or links to a file,",
        change=("sft", edited("manifest.json", files={"../../secret": {"size": 1, "sha256": "0"}})),
    ),
    Row(
        "a broken tokenizer",
        "model.tokenizer=tokenizer",
        r"tokenizer directory 'tokenizer' cannot be loaded: Unrecognized model in tokenizer\. Should have a",
        {"tokenizer/tokenizer.json": "{"},
    ),
    Row(
        "no such tokenizer",
        "model.tokenizer=nowhere",
        r"tokenizer directory 'nowhere' does not exist \(expected tokenizer\.json and its config\)",
    ),
    Row(
        "a tokenizer of another model",
        "model.tokenizer=words",
        r"model\.tokenizer = words: expected the tokenizer that comes with the model, sft/tokenizer \(which has",
        change=("words", other_tokenizer),
    ),
    Row(
        "HF: no config.json",
        "model.restore_from_path=hf",
        r"model\.restore_from_path: hf is no checkpoint and holds none \(step_\*\)",
        change=("hf", removed("config.json")),
    ),
    Row(
        "HF: config.json of a list",
        "model.restore_from_path=hf",
        r"hf/config\.json: expected a JSON object, got list",
        change=("hf", written("config.json", "[]")),
    ),
    Row(
        "HF: no architecture",
        "model.restore_from_path=hf",
        r"hf/config\.json: architecture '\(none\)' is not supported; expected one of: LlamaForCausalLM,",
        change=("hf", edited("config.json", architectures=None)),
    ),
    Row(
        "HF: architectures that are a text",
        "model.restore_from_path=hf",
        r"hf/config\.json: architectures = 'LlamaForCausalLM': expected a list of one name",
        change=("hf", edited("config.json", architectures="LlamaForCausalLM")),
    ),
    Row(
        "HF: a text for the width",
        "model.restore_from_path=hf",
        r"hf/config\.json: invalid configuration: - hidden_size = 'wide': Input should be a valid integer,",
        change=("hf", edited("config.json", hidden_size="wide")),
    ),
    Row(
        "HF: no width",
        "model.restore_from_path=hf",
        r"hf/config\.json: config\.json of LlamaForCausalLM lacks hidden_size",
        change=("hf", edited("config.json", hidden_size=None)),
    ),
    Row(
        "HF: an activation that is not supported",
        "model.restore_from_path=hf",
        r"hf/config\.json: hidden_act = 'relu' in config\.json is not supported; expected 'silu'",
        change=("hf", edited("config.json", hidden_act="relu")),
    ),
    Row(
        "HF: another vocabulary",
        "model.restore_from_path=hf",
        r"hf does not hold the LlamaForCausalLM that its config\.json describes: - model\.embed_tokens\.weight:",
        change=("hf", edited("config.json", vocab_size=99)),
    ),
    Row(
        "HF: weights that are none",
        "model.restore_from_path=hf",
        r"hf/model\.safetensors is damaged or no safetensors file: Error while deserializing header: header",
        change=("hf", written("model.safetensors", "version https://git-lfs")),
    ),
    Row(
        "HF: a tokenizer with code of its own",
        "model.restore_from_path=hf",
        r"tokenizer directory 'hf' cannot be loaded: it needs Python code of its own \(auto_map in its",
        change=(
            "hf",
            edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own"),
        ),
    ),
    Row(
        "HF: a reward model for SFT",
        "model.restore_from_path=hf_rm",
        "model: hf_rm holds a LlamaForSequenceClassification, expected head 'lm'",
    ),
]


@pytest.mark.parametrize("row", MODELS, ids=str)
def test_ends_with_one_clear_message(row: Row, world: Path, directory: Path) -> None:
    check(row, command("train_gpt_sft", row.command), world, directory, rank=1)
