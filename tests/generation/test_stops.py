"""Where a response ends, against a search in its whole text and against transformers."""

import random
from pathlib import Path

import pytest
import torch
from small_models import END, EOS, hf_tokenizer, tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StopStringCriteria

from nemo_eppo.data.tokenizer import Tokenizer, train_bpe
from nemo_eppo.generation.stops import Stops

STRINGS = ("aba", "ob", "kik", "e<end>")
SENTENCE = "The cat sat. The stop came, then stopping — naïve café, 日本語. Human: stop it."


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE, whose tokens may be parts of a character."""
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe([SENTENCE] * 3, 300, path)
    return path


def random_responses(size: int, count: int, length: int) -> list[list[int]]:
    draw = random.Random(4)
    return [[draw.randrange(3, size) for _ in range(length)] for _ in range(count)]


def end_in_blocks(stops: Stops, tokens: list[int], block: int) -> int | None:
    """As an engine asks: after every `block` tokens, as long as the response goes on."""
    for seen in range(0, len(tokens), block):
        if (end := stops.end(tokens[: seen + block], seen)) is not None:
            return end
    return None


def end_in_whole_text(tokens: list[int], strings: tuple[str, ...], tokenizer: Tokenizer) -> int | None:
    sizes = range(1, len(tokens) + 1)
    return next(
        (n for n in sizes if any(s in tokenizer.decode(tokens[:n], special_tokens=True) for s in strings)), None
    )


def test_a_response_ends_with_the_token_that_completes_a_stop_string() -> None:
    stops, ends, within = Stops(STRINGS, EOS, tokenizer()), [], 0
    for tokens in random_responses(61, 40, 60):
        tokens = [END if token == 60 else token for token in tokens]
        expected = end_in_whole_text(tokens, STRINGS, tokenizer())
        assert {end_in_blocks(stops, tokens, block) for block in (1, 3, 8, 60)} == {expected}
        ends.append(expected)
        within += expected is not None and not tokenizer().decode(tokens[:expected]).endswith(STRINGS)
    assert None in ends
    assert len(set(ends)) > 20
    assert within > 10, "stop strings should also have ended inside of a token"


def test_parts_of_characters_are_put_together(bytes_tokenizer: Path) -> None:
    ours, strings = Tokenizer.from_directory(bytes_tokenizer), ("é,", "本", "stop ", " Human")
    stops = Stops(strings, ours.eos_id, ours)
    for text, string in (
        ("a naïve café, no", "é,"),
        ("in 日本語", "本"),
        ("a stop — so", "stop "),
        ("so. Human: x", " Human"),
    ):
        tokens = ours.encode([text])[0]
        end = end_in_whole_text(tokens, strings, ours)
        assert end is not None
        assert string in ours.decode(tokens[:end])
        assert {end_in_blocks(stops, tokens, block) for block in (1, 2, 8, 60)} == {end}


def transformers_end(criteria: StopStringCriteria, tokens: list[int]) -> int | None:
    sizes = range(1, len(tokens) + 1)
    return next((n for n in sizes if bool(criteria(torch.tensor([tokens[:n]]), torch.zeros(1)))), None)


@pytest.mark.parametrize("kind", ["syllables", "bytes"])
def test_the_end_is_where_transformers_stops(kind: str, bytes_tokenizer: Path) -> None:
    theirs: PreTrainedTokenizerBase = hf_tokenizer()
    strings: tuple[str, ...] = STRINGS[:3]
    if kind == "bytes":
        theirs, strings = AutoTokenizer.from_pretrained(bytes_tokenizer), ("st", " na", "t.", "e, th")
    stops, criteria = Stops(strings, EOS, Tokenizer(theirs, kind)), StopStringCriteria(theirs, list(strings))
    responses = random_responses(len(theirs), 40, 40)
    ends = [end_in_blocks(stops, tokens, 8) for tokens in responses]
    assert ends == [transformers_end(criteria, tokens) for tokens in responses]
    assert 8 < sum(end is not None for end in ends) < 40


def test_the_text_of_a_special_token_stands_for_the_token() -> None:
    stops = Stops(("<end>", "<eos>", "<other>"), EOS, tokenizer())
    assert stops.ids == (EOS, END)
    assert stops.end([5, 6, END, 7]) == 3
    assert stops.end([5, END, EOS], seen=2) == 3
    assert stops.end([5, 6, 7]) is None


class Counting(Tokenizer):
    """Counts the tokens that it turns into text."""

    decoded = 0

    def decode(self, ids: list[int], special_tokens: bool = False) -> str:  # type: ignore[override]
        self.decoded += len(ids)
        return super().decode(ids, special_tokens)


def test_only_the_tail_of_a_response_is_turned_into_text() -> None:
    counting, response = Counting(hf_tokenizer(), "counting"), [5] * 4000
    assert end_in_blocks(Stops(("<end>",), EOS, counting), response, 8) is None
    assert counting.decoded == 0, "there is no text to look for"
    assert end_in_blocks(Stops(("abab",), EOS, counting), response, 8) is None
    assert counting.decoded <= 2 * len(response)
