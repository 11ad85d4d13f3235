"""Texts of a file of responses become the tokens that training makes of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from nemo_eppo.config import ConfigError
from nemo_eppo.data.datasets import SFTDataset
from nemo_eppo.data.tokenizer import Tokenizer, word_level
from nemo_eppo.evaluation.evaluation_results import join_rows
from nemo_eppo.evaluation.pairs import read_pairs
from nemo_eppo.evaluation.prompts import read_prompts
from nemo_eppo.evaluation.responses import read_responses
from nemo_eppo.evaluation.source_scoring import sample_of


def test_texts_are_tokenised_as_in_training_with_bos(tmp_path: Path) -> None:
    word_level(["red", "green"], tmp_path / "words")
    fast = PreTrainedTokenizerFast.from_pretrained(tmp_path / "words")
    fast.add_special_tokens({"bos_token": "<s>"})
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", fast.bos_token_id)]
    )
    fast.save_pretrained(tmp_path / "bos")
    tokenizer = Tokenizer.from_directory(tmp_path / "bos")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "red", "response": "green red", "finished": True}) + "\n")
    [found] = read_responses(path, tokenizer, tokenizer.vocab_size, 10)
    trained = SFTDataset(path, tokenizer, max_sequence_length=10)[0]
    assert found.prompt.tolist() == trained.prompt_ids.tolist() == [fast.bos_token_id, *tokenizer.encode(["red"])[0]]
    assert found.response.tolist() == trained.response_ids.tolist()


@pytest.mark.parametrize(
    ("said", "finished"),
    [
        ({}, True),
        ({"finished": False}, False),
        ({"finish_reason": "length"}, False),
        ({"finish_reason": "stop"}, True),
        ({"prompt_ids": [2], "response_ids": [3, 2]}, False),
    ],
)
def test_a_text_that_does_not_say_how_it_ended_is_finished_but_not_counted_as_such(
    said: dict[str, Any], finished: bool, tmp_path: Path
) -> None:
    word_level(["red", "green"], tmp_path / "words")
    tokenizer = Tokenizer.from_directory(tmp_path / "words")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "red", "response": "green red", **said}) + "\n")
    found = read_responses(path, tokenizer, tokenizer.vocab_size, 10)
    sample = sample_of(found[0], tokenizer)
    assert sample.finished == finished
    [row] = join_rows(found, [sample], {})
    assert row.get("finished") == (finished if said else None)


def test_a_prompt_that_the_chat_template_refuses_is_named(tmp_path: Path) -> None:
    word_level(["red", "green"], tmp_path / "words")
    tokenizer = Tokenizer.from_directory(tmp_path / "words")
    tokenizer.chat_template = (
        "{% if messages[0].content == 'red' %}{{ raise_exception('not red') }}{% endif %}{{ messages[0].content }}"
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "response": "red"}) + "\n" for text in ("green", "red")))
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: the tokenizer's chat template refuses this chat: not red"):
        read_responses(path, tokenizer, tokenizer.vocab_size, 10, chat_template=True)
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: field 'prompt': the tokenizer's chat template refuses"):
        read_prompts(path, tokenizer, tokenizer.vocab_size, 10, chat_template=True)


def test_several_responses_to_a_prompt_are_compared_in_their_order(tmp_path: Path) -> None:
    def write(name: str, rows: dict[str, str], **ended: Any) -> Path:
        found = [{"prompt": prompt, "response": response, **ended} for response, prompt in rows.items()]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in found))
        return tmp_path / name

    left = write("left.jsonl", {"a": "p", "b": "q", "c": "p"}, finished=True)
    right = write("right.jsonl", {"x": "p", "y": "p", "z": "q"}, finish_reason="length")
    pairs = read_pairs(left, right)
    assert [(pair.response.response, pair.baseline.response) for pair in pairs] == [("a", "x"), ("b", "z"), ("c", "y")]
    assert [(pair.response.finished, pair.baseline.finished) for pair in pairs] == [(True, False)] * 3


def test_a_judges_gold_reward_sees_what_that_of_evaluate_sees(tmp_path: Path) -> None:
    word_level(["red", "blue"], tmp_path / "words")
    tokenizer = Tokenizer.from_directory(tmp_path / "words")
    path = tmp_path / "rows.jsonl"
    plain = {"prompt": "red", "response": "blue", "answer": "blue"}
    [blue] = tokenizer.encode(["blue"])
    generated = {**plain, "index": 0, "prompt_ids": blue, "response_ids": blue, "fields": {"answer": "red"}}
    ends = {"finished": True, "finish_reason": "stop"}, {"finished": False, "finish_reason": "length"}
    for row in (plain, {**plain, "finish_reason": "length"}, *({**generated, **end} for end in ends)):
        path.write_text(json.dumps(row))
        [response] = read_responses(path, tokenizer, tokenizer.vocab_size, 10)
        seen = replace(sample_of(response, tokenizer), token_ids=())
        assert read_pairs(path, path) == [(seen, seen)]
        assert list(seen.fields) == ["answer"]
