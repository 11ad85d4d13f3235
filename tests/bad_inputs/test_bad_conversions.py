"""Bad inputs of `nemo-eppo prepare` and `nemo-eppo convert`."""

import json
from pathlib import Path

import pytest
import torch
from bad_input import Row, check, edited, prepare, rows, run, tensors, truncated, written

_PAIR = {"chosen": "\n\nHuman: copy\n\nAssistant: the", "rejected": "\n\nHuman: copy\n\nAssistant: a"}
_ROW = {"prompt": "apple", "response": "river"}
HH = "prepare hh --input rows.jsonl --output out --vocab-size 300"
PREPARE = [
    Row(
        "an unknown corpus",
        "prepare ultrafeedback --input rows.jsonl --output out",
        r"argument CORPUS: invalid choice: 'ultrafeedback'",
    ),
    Row("no corpus", "prepare", "the following arguments are required: CORPUS"),
    Row("no input", "prepare hh --output out", "one of the arguments --input --hub is required"),
    Row(
        "input and hub",
        "prepare hh --input rows.jsonl --hub a/b --output out",
        "argument --hub: not allowed with argument --input",
    ),
    Row("no such input", "prepare hh --input nowhere.jsonl --output out", r"nowhere\.jsonl: no such file"),
    Row(
        "a directory",
        "prepare hh --input data --output out",
        r"data: expected \.jsonl, \.jsonl\.gz, \.json, \.json\.gz or \.parquet",
    ),
    Row(
        "another format",
        "prepare hh --input rows.csv --output out",
        r"rows\.csv: expected \.jsonl, \.jsonl\.gz, \.json, \.json\.gz or \.parquet",
        {"rows.csv": "chosen,rejected\n"},
    ),
    Row(
        "an empty file",
        HH,
        r"nothing is left for prompts\.train\.jsonl of rows\.jsonl \(validation_fraction = 0\.05\) read 0 examples",
        {"rows.jsonl": ""},
    ),
    Row(
        "an archive that is none",
        "prepare hh --input rows.jsonl.gz --output out",
        r"rows\.jsonl\.gz: damaged archive after line 0: Not a gzipped file \(b'x'\)",
        {"rows.jsonl.gz": "x"},
    ),
    Row(
        "a table that is none",
        "prepare hh --input rows.parquet --output out",
        r"rows\.parquet: damaged parquet file after row 0: Parquet file size is 1 bytes, smaller than the",
        {"rows.parquet": "x"},
    ),
    Row(
        "an array that is cut",
        "prepare hh --input rows.json --output out",
        r"rows\.json: damaged JSON array after line 1",
        {"rows.json": f"[{json.dumps(_PAIR)},"},
    ),
    Row(
        "an array that is nested too deep",
        "prepare hh --input rows.json --output out",
        r"rows\.json: the JSON array is nested too deep after line 1",
        {"rows.json": "[" * 200_000},
    ),
    Row(
        "no row that can be used",
        HH,
        r"nothing is left for prompts\.train\.jsonl of rows\.jsonl \(validation_fraction = 0\.05\) read 2 examples",
        rows(_ROW, _ROW),
    ),
    Row(
        "a broken row when asked to stop there",
        f"{HH} --strict",
        r"rows\.jsonl:2: not JSON",
        rows(_PAIR, '{"chosen": '),
    ),
    Row(
        "a row nested too deep when asked to stop",
        f"{HH} --strict",
        r"rows\.jsonl:2: nested too deep",
        rows(_PAIR, "[" * 200_000),
    ),
    Row(
        "another corpus",
        "prepare tldr --input rows.jsonl --output out --strict",
        r"rows\.jsonl:1: the fields fit no layout that is read",
        rows(_PAIR),
    ),
    Row(
        "everything held out",
        f"{HH} --validation-fraction 1",
        r"validation_fraction = 1\.0: Input should be less than 1",
        rows(_PAIR),
    ),
    Row(
        "a fraction of NaN",
        f"{HH} --validation-fraction nan",
        "validation_fraction = nan: Input should be a finite number",
        rows(_PAIR),
    ),
    Row(
        "a fraction in words",
        f"{HH} --validation-fraction half",
        "argument --validation-fraction: invalid float value: 'half'",
        rows(_PAIR),
    ),
    Row(
        "one prompt, which cannot be split",
        HH,
        r"nothing is left for preferences\.validation\.jsonl of rows\.jsonl \(validation_fraction = 0\.05\) read 1",
        rows(_PAIR),
    ),
    Row(
        "a limit of 0",
        f"{HH} --max-prompt-tokens 0",
        "max_prompt_tokens = 0: Input should be greater than or equal to 1",
        rows(_PAIR),
    ),
    Row(
        "a vocabulary below 256",
        "prepare hh --input rows.jsonl --output out --vocab-size 8",
        r"vocab_size = 8: byte-level BPE needs at least 258 \(bytes, <eos>, <pad>\)",
        rows(*[_PAIR] * 3),
    ),
    Row(
        "no such tokenizer",
        "prepare hh --input rows.jsonl --output out --tokenizer nowhere",
        r"tokenizer directory 'nowhere' does not exist \(expected tokenizer\.json and its config\)",
        rows(_PAIR),
    ),
    Row(
        "a template that the tokenizer lacks",
        "prepare hh --input rows.jsonl --output out --tokenizer data/tokenizer --chat-template",
        "chat_template = 'tokenizer': the tokenizer has no chat template of its own; give a file",
        rows(_PAIR),
    ),
    Row(
        "a broken template",
        f"{HH} --chat-template chat.jinja",
        "a chat template needs a tokenizer: it spells that tokenizer's special tokens",
        {**rows(_PAIR), "chat.jinja": "{% for m in messages %}"},
    ),
    Row(
        "an output that exists",
        "prepare hh --input rows.jsonl --output out",
        "output directory 'out' already exists and is not empty; choose another or remove it",
        {**rows(_PAIR), "out/file": ""},
    ),
    Row(
        "an output below a file",
        "prepare hh --input rows.jsonl --output rows.jsonl/out",
        r"rows\.jsonl: File exists; a file is in the way; choose another name",
        rows(_PAIR),
    ),
    Row(
        "a toy task of no prompts",
        "prepare noun-task --output out --prompts 0",
        "prompts = 0: Input should be greater than or equal to 1",
    ),
    Row(
        "a toy task of a negative size",
        "prepare noun-task --output out --sft-examples -5",
        "sft_examples = -5: Input should be greater than or equal to 1",
    ),
]

CONVERT = [
    Row(
        "an unknown conversion",
        "convert hf-to-nemo --input hf --output out",
        r"argument CONVERSION: invalid choice: 'hf-to-nemo'",
    ),
    Row(
        "no such input",
        "convert hf-to-megatron --input nowhere --output out",
        r"nowhere/config\.json cannot be read: No such file or directory",
    ),
    Row(
        "a file",
        "convert hf-to-megatron --input file --output out",
        r"file/config\.json cannot be read: Not a directory",
        {"file": ""},
    ),
    Row(
        "a checkpoint for a Hugging Face directory",
        "convert hf-to-megatron --input sft --output out",
        r"sft/config\.json cannot be read: No such file or directory",
    ),
    Row(
        "a Hugging Face directory for a checkpoint",
        "convert megatron-to-hf --input hf --output out",
        r"--input: hf is no checkpoint and holds none \(step_\*\)",
    ),
    Row(
        "an output that exists",
        "convert hf-to-megatron --input hf --output out",
        "--output: out already exists; choose another or remove it",
        {"out/file": ""},
    ),
    Row(
        "an output below a file",
        "convert hf-to-megatron --input hf --output file/out",
        "file: File exists; a file is in the way; choose another name",
        {"file": ""},
    ),
    Row(
        "an unknown precision",
        "convert hf-to-megatron --input hf --output out --precision int8",
        r"argument --precision: invalid choice: 'int8'",
    ),
    Row(
        "a misshapen tensor",
        "convert hf-to-megatron --input hf --output out",
        r"hf does not hold the LlamaForCausalLM that its config\.json describes: - model\.norm\.weight: expected",
        change=("hf", tensors(model__norm__weight=torch.ones(5))),
    ),
    Row(
        "a policy's architecture for a reward model",
        "convert megatron-to-hf --input rm --output out --architecture LlamaForCausalLM",
        "architecture 'LlamaForCausalLM': expected one that ends with ForSequenceClassification",
    ),
    Row(
        "a reward model's architecture for a policy",
        "convert megatron-to-hf --input sft --output out --architecture LlamaForSequenceClassification",
        "architecture 'LlamaForSequenceClassification': expected one that ends with ForCausalLM",
    ),
    Row(
        "a kind of head that Hugging Face lacks",
        "convert megatron-to-hf --input rm --output out",
        "rm has a head of kind odin, which Hugging Face lacks",
        change=("rm", edited("manifest.json", head="odin")),
    ),
    Row(
        "an architecture that does not fit",
        "convert megatron-to-hf --input sft --output out --architecture GPT2LMHeadModel",
        "architecture 'GPT2LMHeadModel': expected one that ends with ForCausalLM",
    ),
    Row(
        "a truncated checkpoint",
        "convert megatron-to-hf --input sft --output out",
        r"sft is damaged: weights/__0_0\.distcp has 95503 bytes, its manifest says 95504",
        change=("sft", truncated),
    ),
    Row(
        "a broken manifest",
        "convert megatron-to-hf --input sft --output out",
        r"sft/manifest\.json cannot be read: not JSON \(Expecting property name enclosed in double quotes: line",
        change=("sft", written("manifest.json", "{")),
    ),
    Row(
        "no such .nemo file",
        "convert nemo-to-megatron --input rm.nemo --tokenizer data/tokenizer --output out",
        r"--input: rm\.nemo does not exist",
    ),
    Row(
        "a .nemo file that is none",
        "convert nemo-to-megatron --input rm.nemo --tokenizer data/tokenizer --output out",
        r"rm\.nemo: expected a directory or a \.nemo file, which is a tar archive: ",
        {"rm.nemo": "PK"},
    ),
    Row(
        "a Hugging Face directory for a .nemo file",
        "convert nemo-to-megatron --input hf --tokenizer data/tokenizer --output out",
        r"hf has no model_config\.yaml: expected a model of NeMo 1\.x or NeMo-Aligner",
    ),
    Row(
        "no settings of NeMo-Aligner",
        "convert aligner-config nowhere.yaml",
        r"nowhere\.yaml: \[Errno 2\] No such file or directory: .*nowhere\.yaml'",
    ),
    Row(
        "broken settings of NeMo-Aligner",
        "convert aligner-config a.yaml",
        r"a\.yaml:2: expected ',' or '\]', but got ':': 'b: 2'",
        {"a.yaml": "model: {a: [1\nb: 2\n"},
    ),
    Row(
        "a list for settings of NeMo-Aligner",
        "convert aligner-config a.yaml",
        r"a\.yaml: expected keys and values, found a list",
        {"a.yaml": "- a\n"},
    ),
    Row(
        "empty settings of NeMo-Aligner",
        "convert aligner-config a.yaml",
        r"a\.yaml: not recognised as a file of NeMo-Aligner's PPO actor, PPO critic, reward server,",
        {"a.yaml": ""},
    ),
    Row(
        "settings of no known kind",
        "convert aligner-config a.yaml",
        r"a\.yaml: not recognised as a file of NeMo-Aligner's PPO actor, PPO critic, reward server,",
        {"a.yaml": "optim: 1\n"},
    ),
    Row(
        "settings of an unknown kind",
        "convert aligner-config a.yaml --kind dpo",
        r"argument --kind: invalid choice: 'dpo'",
        {"a.yaml": "trainer: {}\n"},
    ),
    Row(
        "settings to an existing file",
        "convert aligner-config a.yaml --output a.yaml",
        r"--output a\.yaml exists already; nothing is ever overwritten",
        {"a.yaml": "trainer: {}\n"},
    ),
]


@pytest.mark.parametrize("row", [*PREPARE, *CONVERT], ids=str)
def test_ends_with_one_clear_message(row: Row, world: Path, directory: Path) -> None:
    check(row, f"nemo-eppo {row.command}", world, directory)


_PAIRS = [{side: text.replace("copy", str(n)) for side, text in _PAIR.items()} for n in range(100)]


@pytest.mark.parametrize(
    "command",
    [HH, "convert hf-to-megatron --input hf --output out", "convert megatron-to-hf --input sft --output out"],
)
def test_the_same_command_without_the_fault_does_its_work(command: str, world: Path, directory: Path) -> None:
    prepare(world, directory, Row("", "", "", rows(*_PAIRS)))
    status, output = run(f"nemo-eppo {command}", directory)
    assert status == 0, output
    assert (directory / "out").is_dir()
