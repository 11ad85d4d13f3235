"""Bad inputs of `nemo-eppo score`, `doctor` and `certificates`, and of no command."""

from pathlib import Path

import pytest
from bad_input import BUILT, Row, check, prepare, rows, run

_ROW = {"prompt": "apple", "response": "river"}
SCORE = "score --model sft --data rows.jsonl --output scores.jsonl"
SCORING = [
    Row(
        "no such model",
        "score --model nowhere --data rows.jsonl --output scores.jsonl",
        r"--model: nowhere does not exist",
        rows(_ROW),
    ),
    Row("no such data", SCORE, r"rows\.jsonl: no such file"),
    Row(
        "no model",
        "score --data rows.jsonl --output scores.jsonl",
        "the following arguments are required: --model",
        rows(_ROW),
    ),
    Row(
        "a reward model",
        "score --model rm --data rows.jsonl --output scores.jsonl",
        r"--model: rm holds a model with head 'scalar', expected 'lm'",
        rows(_ROW),
    ),
    Row("no rows", SCORE, r"rows\.jsonl: no rows", rows()),
    Row(
        "a missing response",
        SCORE,
        r"rows\.jsonl:2: field 'response' is missing \(the line has: prompt\)",
        rows(_ROW, {"prompt": "apple"}),
    ),
    Row(
        "token ids of another vocabulary",
        SCORE,
        r"rows\.jsonl:1: field 'response_ids' = \[99999\]: expected a list of token ids below 64",
        rows({"prompt_ids": [3], "response_ids": [99999]}),
    ),
    Row(
        "token ids that are text",
        SCORE,
        r"rows\.jsonl:1: field 'prompt_ids' = \['3'\]: expected a list of token ids below 64",
        rows({"prompt_ids": ["3"], "response_ids": [4]}),
    ),
    Row(
        "a row beyond the window",
        SCORE,
        r"rows\.jsonl:1: 1 \+ 60 tokens are more than the model's window of 48",
        rows({"prompt_ids": [3], "response_ids": [4] * 60}),
    ),
    Row("a row nested too deep", SCORE, r"rows\.jsonl:2: nested too deep", rows(_ROW, '{"prompt": ' + "[" * 200_000)),
    Row(
        "an unknown preset",
        f"{SCORE} --preset residual",
        r"argument --preset: invalid choice: 'residual' \(choose from 'paper', 'mlp_block', ",
        rows(_ROW),
    ),
    Row(
        "a layer that there is not",
        f"{SCORE} --layer 4",
        r"energy\.layers: 4 is not a layer of a model with 4 layers",
        rows(_ROW),
    ),
    Row(
        "a batch of 0",
        f"{SCORE} --batch-size 0",
        "batch_size = 0: Input should be greater than or equal to 1",
        rows(_ROW),
    ),
    Row(
        "TP that does not divide the heads",
        f"{SCORE} --tp 3",
        r"impossible layout: - --model\.architecture\.num_attention_heads = 4 is not divisible by",
        rows(_ROW),
    ),
    Row("no template", f"{SCORE} --chat-template", "--chat-template: the tokenizer of sft has none", rows(_ROW)),
    Row(
        "equal samples",
        "generate --model sft --prompts data/prompts.train.jsonl --output out.jsonl --greedy --samples-per-prompt 2",
        "--samples-per-prompt 2: greedy responses to a prompt are equal, expected 1",
    ),
    Row("an output without a name", f"{SCORE} --output ''", r"--output: \.: expected the name of a file", rows(_ROW)),
    Row(
        "a compressed output",
        f"{SCORE} --output scores.jsonl.gz",
        r"--output: scores\.jsonl\.gz: expected the name of a file, which is not compressed",
        rows(_ROW),
    ),
    Row(
        "an output below a file",
        f"{SCORE} --output rows.jsonl/scores",
        r"--output: rows\.jsonl is not a directory",
        rows(_ROW),
    ),
    Row(
        "an output in no directory",
        f"{SCORE} --output nowhere/scores.jsonl",
        "--output: nowhere is not a directory",
        rows(_ROW),
    ),
    Row(
        "an output of something else",
        f"{SCORE} --output other.jsonl",
        r"--output: other\.jsonl exists, but nemo-eppo score did not write it \(there is no",
        {**rows(_ROW), "other.jsonl": "x\n"},
    ),
    Row(
        "an output that is a directory",
        f"{SCORE} --output out",
        r"--output: out exists, but nemo-eppo score did not write it \(there is no out\.settings\.json\); choose",
        {**rows(_ROW), "out": None},
    ),
]

DOCTOR = [
    Row(
        "no such launch file",
        "doctor nowhere.yaml",
        r"launch file nowhere\.yaml does not exist, expected a launch file -> see nemo-eppo launch --help",
        status=1,
    ),
    Row(
        "a broken launch file",
        "doctor run.yaml",
        r"launch file .*expected the node content, but found '<stream end>': 'jobs: \[' -> see",
        {"run.yaml": "jobs: [\n"},
        status=1,
    ),
    Row(
        "a URL of http",
        "doctor --server http://127.0.0.1:5555",
        r"server http://127\.0\.0\.1:5555 invalid configuration: - url = 'http://127\.0\.0\.1:5555': expected",
        status=1,
    ),
    Row(
        "a server that is not there",
        "doctor --server grpc://127.0.0.1:9",
        r"server grpc://127\.0\.0\.1:9 server server at grpc://127\.0\.0\.1:9 unavailable for status: failed to",
        status=1,
    ),
    Row(
        "certificates that are nowhere",
        "doctor --server grpc://127.0.0.1:9 --certificates nowhere",
        r"server grpc://127\.0\.0\.1:9 certificates = nowhere: no ca\.pem, cert\.pem, key\.pem; expected ca\.pem,",
        status=1,
    ),
]

OTHERS = [
    Row("no command", "", "the following arguments are required: COMMAND"),
    Row(
        "an unknown command",
        "train",
        r"argument COMMAND: invalid choice: 'train'",
    ),
    Row(
        "a folder of certificates that exists", "certificates data", "data exists already: expected a folder to be made"
    ),
    Row(
        "a folder of certificates below a file",
        "certificates file/pem",
        "file/pem: Not a directory; a file is in the way; choose another name",
        {"file": ""},
    ),
    Row("no folder of certificates", "certificates", "the following arguments are required: FOLDER"),
]

TABLE = [*SCORING, *DOCTOR, *OTHERS]


@pytest.mark.parametrize("row", TABLE, ids=[f"{row.command.partition(' ')[0]}: {row}" for row in TABLE])
def test_ends_with_one_clear_message(row: Row, world: Path, directory: Path) -> None:
    check(row, f"nemo-eppo {row.command}", world, directory)


@pytest.mark.parametrize(
    ("command", "found"), [(SCORE, BUILT), ("certificates pem", "wrote ca.pem"), ("doctor", "ok  Python")]
)
def test_the_same_command_without_the_fault_does_its_work(
    command: str, found: str, world: Path, directory: Path
) -> None:
    prepare(world, directory, Row("", "", "", rows(_ROW)))
    status, output = run(f"nemo-eppo {command}", directory)
    assert status == (found == BUILT)
    assert found in output
