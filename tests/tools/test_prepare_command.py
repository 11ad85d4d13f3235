"""`nemo-eppo prepare`: its files, its exit codes, and that asking for help is cheap."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_eppo.cli import main

SIZES = ["--sft-examples", "10", "--preference-pairs", "10", "--prompts", "10", "--validation-examples", "5"]


def test_noun_task_is_written(tmp_path: Path) -> None:
    assert main(["prepare", "noun-task", "--output", str(tmp_path / "out"), "--seed", "1", *SIZES]) == 0
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    kinds = {f"{kind}.{split}.jsonl" for kind in ("sft", "preferences", "prompts") for split in ("train", "validation")}
    assert names == kinds | {"tokenizer"}


def test_hh_prints_what_was_read_dropped_and_written(
    write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{k: f"\n\nHuman: {n}?\n\nAssistant: {k}" for k in ("chosen", "rejected")} for n in range(30)]
    path = write_rows(*rows, {"chosen": "x", "rejected": "y"})
    options = ["--vocab-size", "300", "--validation-fraction", "0.3", "--max-response-tokens", "20"]
    assert main(["prepare", "hh", "--input", str(path), "--output", str(tmp_path / "out"), *options]) == 0
    output = capsys.readouterr().out
    assert "31 examples" in output
    assert f"1 no assistant turn (first: {path}:31)" in output
    written = sum(
        len((tmp_path / "out" / f"sft.{split}.jsonl").read_text().splitlines()) for split in ("train", "validation")
    )
    assert written == 30


def test_every_option_reaches_the_preparation(
    write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """{"text"} pairs with a marker of their own, in an array."""
    texts = [f"Q{n}\nA:\n{answer}" for n in range(20) for answer in ("good", "bad")]
    (tmp_path / "rows.json").write_text(json.dumps([{"text": text} for text in texts]))
    options = ["--vocab-size", "300", "--validation-fraction", "0.3", "--response-marker", r"\nA:\n", "--strict"]
    target = ["--output", str(tmp_path / "out"), "--system-prompt", "Be brief."]
    assert main(["prepare", "nemo_aligner", "--input", str(tmp_path / "rows.json"), *target, *options]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "preferences.train.jsonl").read_text().splitlines()]
    assert {"prompt": "Be brief.\n\nQ0\nA:\n", "chosen": "good", "rejected": "bad"} in rows
    template = ["--chat-template", "--output", str(tmp_path / "chat")]
    assert main(["prepare", "nemo_aligner", "--input", str(tmp_path / "rows.json"), *template]) == 2
    assert "a chat template needs" in capsys.readouterr().err


def test_fields_to_keep_are_named_with_commas(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    path = write_rows(*({"prompt": f"q{n}", "answer": n, "source": "s", "id": n} for n in range(30)))
    options = ["--vocab-size", "300", "--validation-fraction", "0.3", "--keep", "answer,source"]
    assert main(["prepare", "rows", "--input", str(path), "--output", str(tmp_path / "out"), *options]) == 0
    row = json.loads((tmp_path / "out" / "prompts.train.jsonl").read_text().splitlines()[0])
    assert list(row) == ["prompt", "answer", "source"]


def test_bad_input_is_one_message_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = str(tmp_path / "absent.jsonl")
    assert main(["prepare", "hh", "--input", absent, "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"nemo-eppo: error: {absent}: no such file\n"
    (tmp_path / "file").write_text("")
    assert main(["prepare", "noun-task", "--output", str(tmp_path / "file" / "out"), *SIZES]) == 2
    assert capsys.readouterr().err.startswith("nemo-eppo: error: ")


def test_a_failure_leaves_nothing_behind_and_claims_nothing(
    write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"q{number}"} for number in range(4)]
    output, size = tmp_path / "new" / "deep" / "out", ["--vocab-size", "300"]
    for arguments, message in (
        (
            [str(write_rows(*rows)), "--validation-fraction", "0.000001", *size],
            "nothing is left for prompts.validation.jsonl",
        ),
        ([str(tmp_path)], f"{tmp_path}: "),
        ([str(tmp_path / "rows.jsonl"), "--tokenizer", "nowhere"], "tokenizer directory 'nowhere' does not exist"),
    ):
        assert main(["prepare", "prompts", "--output", str(output), "--input", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "wrote" not in error
        assert not (tmp_path / "new").exists()
    (tmp_path / "folder.jsonl").mkdir()
    assert main(["prepare", "prompts", "--output", str(output), "--input", str(tmp_path / "folder.jsonl")]) == 2
    assert "folder.jsonl: a directory, expected a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["prepare"],
        ["prepare", "hh", "--input", "x", "--output", "y", "--tokenizer", "t", "--vocab-size", "300"],
        ["prepare", "hh", "--input", "x", "--hub", "n", "--output", "y"],
        ["prepare", "hh", "--output", "y"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    "command",
    [
        "",
        "prepare",
        "prepare nemo_aligner",
        "generate",
        "evaluate",
        "score",
        "energy-report",
        "detect",
        "judge",
        "latents",
    ],
)
def test_help_answers_without_a_heavy_import(command: str) -> None:
    script = (
        "import sys; from nemo_eppo.cli import main\n"
        "heavy = {'torch', 'transformers', 'megatron', 'nemo', 'numpy'}\n"
        "try: main()\n"
        "finally: print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, *command.split(), "--help"], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "[]"
    assert "usage: nemo-eppo" in run.stdout


def test_help_shows_defaults_that_are_0_but_no_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["judge", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "sampling temperature of the judge (default: 0.0)" in said
    assert "(default: False)" not in said
