"""The table of job kinds says what the scripts, their settings and their data say."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nemo_eppo.config import Config, ConfigError, config_types
from nemo_eppo.data.datasets import PreferenceDataset, PromptDataset, SFTDataset
from nemo_eppo.data.tokenizer import Tokenizer, word_level
from nemo_eppo.settings.kinds import KINDS

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "nlp" / "gpt"
READERS: dict[str, Callable[..., Any]] = {
    "train_gpt_sft": partial(SFTDataset, max_sequence_length=9),
    "train_reward_model": partial(PreferenceDataset, max_sequence_length=9),
    "train_gpt_ppo_actor": partial(PromptDataset, max_prompt_length=9),
    "read_reference_energies": partial(PromptDataset, max_prompt_length=9),
}


def test_every_script_and_every_yaml_file_has_its_entry() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(KINDS)
    assert {path.stem for path in (ROOT / "conf").glob("*.yaml")} == {kind.config_name for kind in KINDS.values()}


def annotation(schema: type[Config], key: str) -> Any:
    """The type of the setting with a dotted key."""
    first, _, rest = key.partition(".")
    found = schema.model_fields[first].annotation
    return annotation(config_types(found)[0], rest) if rest else found


@pytest.mark.parametrize("script", KINDS)
def test_an_entry_says_what_the_script_says(script: str) -> None:
    kind, tree = KINDS[script], ast.parse((SCRIPTS / f"{script}.py").read_text())
    [main] = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert ast.unparse(main.decorator_list[0]) == f"job({kind.schema.__name__}, config_name='{kind.config_name}')"
    origins = {
        alias.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert origins[kind.schema.__name__] == kind.schema.__module__


@pytest.mark.parametrize("script", KINDS)
def test_an_entry_fits_the_settings(script: str) -> None:
    kind = KINDS[script]
    fields = kind.schema.model_fields.keys()
    assert ("server" in fields) == (kind.serves is not None)
    assert ("ppo" in fields) == kind.samples
    assert ("generation" in fields) == hasattr(kind.schema, "check_model")
    assert ("data" in fields) == bool(kind.row_fields) == (script in READERS)
    assert ("optimizer" in fields) == bool(kind.rows_per_step) or kind.serves == "critic"
    if kind.rows_per_step:
        assert annotation(kind.schema, kind.rows_per_step) is int
        assert annotation(kind.schema, "data.train") is Path


@pytest.mark.parametrize("script", READERS)
def test_the_fields_of_a_row_are_those_that_the_job_reads(script: str, tmp_path: Path) -> None:
    word_level(["a", "b"], tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_directory(tmp_path / "tokenizer")
    rows, fields = tmp_path / "rows.jsonl", KINDS[script].row_fields
    rows.write_text(json.dumps(dict(zip(fields, ("a b", "a", "b"), strict=False))))  # no equal sides of a pair
    assert len(READERS[script](rows, tokenizer)) == 1
    for field in fields:
        rows.write_text(json.dumps({other: "a b" for other in fields if other != field}))
        with pytest.raises(ConfigError, match=f"field '{field}' is missing"):
            READERS[script](rows, tokenizer)


def test_a_preference_pair_is_two_sequences_and_every_other_row_is_one() -> None:
    assert {script for script, kind in KINDS.items() if kind.sequences_per_row == 2} == {"train_reward_model"}
    assert {kind.sequences_per_row for kind in KINDS.values()} == {1, 2}


def test_the_table_and_a_launch_file_are_read_without_torch() -> None:
    code = "import sys, nemo_eppo.settings.kinds, nemo_eppo.launch.launch_file; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert told.stdout == "False\n"
