"""One owner of BOS and EOS, checked against transformers' own encoding of the same tokenizer directory."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nemo_eppo.config import ConfigError
from nemo_eppo.data.tokenizer import Tokenizer, encode_in_blocks, train_bpe, word_level

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "a cat and a dog"]


@pytest.fixture(scope="module")
def bpe_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bpe")
    train_bpe(iter(TEXTS), 270, directory)
    return directory


@pytest.fixture(scope="module")
def with_bos(bpe_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same BPE in Llama's manner: its post-processor puts <s> in front."""
    tokenizer = AutoTokenizer.from_pretrained(bpe_directory)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    directory = tmp_path_factory.mktemp("bos")
    tokenizer.save_pretrained(directory)
    return directory


def edited_copy(source: Path, target: Path, **settings: Any) -> Path:
    """Copy of a tokenizer directory with entries of tokenizer_config.json replaced, or removed (None)."""
    target.mkdir()
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text()) | settings
    (target / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def test_bpe_round_trips_any_text_without_a_change(bpe_directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(bpe_directory)
    text = "\n\nHuman: café 漢字 \U0001f9ed  two  spaces , kept .\t"
    assert tokenizer.decode(tokenizer.encode_prompt(text) + tokenizer.encode_responses([text])[0]) == text + text


def test_bpe_has_the_size_asked_for_and_learns_merges(bpe_directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(bpe_directory)
    assert tokenizer.vocab_size == 270
    assert len(tokenizer.encode_prompt(" the")) == 1


def test_bpe_smaller_than_its_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size = 257.*at least 258"):
        train_bpe(TEXTS, 257, tmp_path)


def test_prompt_gets_no_bos_from_a_tokenizer_that_adds_none(bpe_directory: Path) -> None:
    reference = AutoTokenizer.from_pretrained(bpe_directory)
    assert Tokenizer.from_directory(bpe_directory).encode_prompt(TEXTS[0]) == reference(TEXTS[0])["input_ids"]


def test_prompt_gets_bos_once_from_a_tokenizer_that_adds_it(with_bos: Path) -> None:
    reference = AutoTokenizer.from_pretrained(with_bos)
    ids = Tokenizer.from_directory(with_bos).encode_prompt(TEXTS[0])
    assert ids == reference(TEXTS[0])["input_ids"]
    assert ids.count(reference.bos_token_id) == 1


def test_bos_that_a_template_already_wrote_is_not_doubled(with_bos: Path) -> None:
    tokenizer = Tokenizer.from_directory(with_bos)
    assert tokenizer.encode_prompt("<s>" + TEXTS[0]) == tokenizer.encode_prompt(TEXTS[0])


def test_bos_is_never_doubled_whoever_writes_it(with_bos: Path) -> None:
    tokenizer = Tokenizer.from_directory(with_bos)
    assert tokenizer.encode_prompt("<s><s>" + TEXTS[0]) == tokenizer.encode_prompt(TEXTS[0])
    assert tokenizer.encode_prompt("") == tokenizer.encode_prompt("<s>")


def test_bos_that_is_defined_but_never_added_stays_out(with_bos: Path, tmp_path: Path, bpe_directory: Path) -> None:
    quiet = AutoTokenizer.from_pretrained(bpe_directory)
    quiet.add_special_tokens({"bos_token": "<s>"})
    quiet.save_pretrained(tmp_path)
    assert quiet.bos_token_id not in Tokenizer.from_directory(tmp_path).encode_prompt(TEXTS[0])


def test_response_has_no_bos_and_one_eos(with_bos: Path) -> None:
    tokenizer = Tokenizer.from_directory(with_bos)
    plain = AutoTokenizer.from_pretrained(with_bos)(TEXTS[1], add_special_tokens=False)["input_ids"]
    assert tokenizer.encode_responses([TEXTS[1]])[0] == [*plain, tokenizer.eos_id]
    assert tokenizer.encode_responses([TEXTS[1] + "<eos>"])[0] == [*plain, tokenizer.eos_id]
    assert tokenizer.encode_responses([TEXTS[1]], end=False)[0] == plain
    assert tokenizer.encode_responses([""])[0] == [tokenizer.eos_id]


def test_response_that_spells_eos_before_its_end_is_refused(bpe_directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"before its end.*stop<eos>go"):
        Tokenizer.from_directory(bpe_directory).encode_responses(["stop<eos>go"])


def test_batches_equal_single_texts(with_bos: Path) -> None:
    tokenizer = Tokenizer.from_directory(with_bos)
    assert tokenizer.encode_prompts(TEXTS) == [tokenizer.encode_prompt(text) for text in TEXTS]
    assert tokenizer.encode_responses(TEXTS) == [tokenizer.encode_responses([text])[0] for text in TEXTS]
    assert tokenizer.encode_prompts([]) == []


def test_decode_drops_special_tokens(words: Tokenizer) -> None:
    assert words.decode([2, 3, words.eos_id, words.pad_id]) == "red green"


def test_word_level_is_one_token_per_word(words: Tokenizer) -> None:
    assert words.vocab_size == 8
    assert words.encode_prompt("three red  red") == [7, 2, 2]
    assert words.encode_responses(["blue"])[0] == [4, words.eos_id]


def test_word_outside_the_vocabulary_is_an_error(words: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"cannot be tokenised.*red purple"):
        words.encode_prompt("red purple")


def test_pad_is_the_tokenizers_own(words: Tokenizer) -> None:
    assert (words.eos_id, words.pad_id) == (0, 1)


def test_pad_falls_back_to_eos_and_says_so(
    bpe_directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = edited_copy(bpe_directory, tmp_path / "no_pad", pad_token=None)
    with caplog.at_level(logging.INFO):
        for _ in range(2):  # as a job does that has two models
            tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.pad_id == tokenizer.eos_id
    assert [record.levelname for record in caplog.records if "no pad_token" in record.message] == ["INFO"]  # rank 0's


def test_tokenizer_without_eos_is_refused(bpe_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no_eos.*eos_token"):
        Tokenizer.from_directory(edited_copy(bpe_directory, tmp_path / "no_eos", eos_token=None))


def test_missing_directory_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent"):
        Tokenizer.from_directory(tmp_path / "absent")
    with pytest.raises(ConfigError, match=tmp_path.name):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match=tmp_path.name):
        Tokenizer.from_directory(tmp_path)


def test_a_tokenizer_that_is_code_is_refused_without_a_question(
    bpe_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda question: "y")
    its_own = {"AutoTokenizer": [None, "its_own.Theirs"]}
    directory = edited_copy(bpe_directory, tmp_path / "theirs", auto_map=its_own, tokenizer_class="Theirs")
    code = f"from transformers import PreTrainedTokenizerFast as Theirs\nopen({str(tmp_path / 'marker')!r}, 'w')\n"
    (directory / "its_own.py").write_text(code)
    with pytest.raises(ConfigError, match=r"theirs' cannot be loaded: it needs Python code of its own .*never run"):
        Tokenizer.from_directory(directory)
    assert not (tmp_path / "marker").exists()


def test_digest_survives_saving_and_sees_every_difference(
    bpe_directory: Path, with_bos: Path, words: Tokenizer, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_directory(bpe_directory)
    tokenizer.save(tmp_path / "copy")
    assert Tokenizer.from_directory(tmp_path / "copy").digest == tokenizer.digest
    word_level(["green", "red", "blue", "one", "two", "three"], tmp_path / "swapped")
    others = [
        Tokenizer.from_directory(with_bos),
        words,
        Tokenizer.from_directory(tmp_path / "swapped"),
        Tokenizer.from_directory(edited_copy(bpe_directory, tmp_path / "other_eos", eos_token="<pad>")),
    ]
    assert len({tokenizer.digest, *(other.digest for other in others)}) == 5


def test_a_digest_is_computed_once(bpe_directory: Path) -> None:
    class Counted(PreTrainedTokenizerFast):
        reads = 0

        def get_vocab(self) -> dict[str, int]:
            Counted.reads += 1
            return dict(super().get_vocab())

    tokenizer = Tokenizer(Counted.from_pretrained(bpe_directory), "counted")
    Counted.reads = 0
    first = tokenizer.digest
    assert first == Tokenizer.from_directory(bpe_directory).digest
    assert [tokenizer.digest for _ in range(3)] == [first] * 3
    assert Counted.reads == 1


def test_a_text_that_cannot_be_tokenised_spoils_no_other(words: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_eppo.data.tokenizer._TOKENISED_AT_ONCE", 4)
    texts = ["red", "purple", "one two", "", "green", "blue", "three three", "pink", "one", "two"]
    blocks: list[int] = []

    def encode(block: list[str]) -> list[list[int]]:
        blocks.append(len(block))
        return words.encode(block)

    found = list(encode_in_blocks(iter(texts), encode))
    assert [text for text, _ in found] == texts
    for text, ids in found:
        if text in ("purple", "pink"):
            assert isinstance(ids, ConfigError)
            assert text in str(ids)
        else:
            assert ids == words.encode([text])[0]
    assert blocks == [4, 1, 1, 1, 1, 4, 1, 1, 1, 1, 2], "one by one only where something is wrong"


def test_saved_directory_is_an_ordinary_hugging_face_tokenizer(bpe_directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bpe_directory)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<eos>", "<pad>")
