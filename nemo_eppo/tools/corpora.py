"""Readers of public corpora: each turns the fields of a row into prompt and responses.

A reader yields the examples of a row, or raises `Malformed`. The help of `nemo-eppo prepare` lists the fields that it
reads; other fields are ignored.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

from nemo_eppo.tools.sources import Row

Fields = Mapping[str, Any]
Turn = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}, as chat templates take it."""

HH_ASSISTANT = "\n\nAssistant:"
ALIGNER_ASSISTANT = "<extra_id_1>Assistant\n"
NO_LAYOUT = "the fields fit no layout that is read"

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_NAMES = {"user": "Human", "assistant": "Assistant"}


class Malformed(ValueError):
    """A row that its reader cannot use. The message names the field but no value: rows are counted by message."""


@dataclass(frozen=True, slots=True)
class Example:
    """One example of a corpus."""

    prompt: str
    """Plain text that a response follows immediately."""
    responses: tuple[str, ...]
    """None for a prompt alone, one for a demonstration, or chosen and rejected."""
    turns: tuple[Turn, ...]
    """The prompt as turns for a chat template; empty if it exists as formatted text only."""
    opening: str
    """Text whose hash decides between train and validation: examples with the same opening go to the same side."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """The functions that turn the rows of a corpus into examples."""

    read: Callable[[Fields], Iterable[Example]]
    join: Callable[[Iterator[Row]], Iterator[Row]] = iter
    """Joins several rows into one, for layouts whose examples span rows of a file."""


def read_hh(fields: Fields) -> Iterator[Example]:
    chosen, rejected = _text(fields, "chosen"), _text(fields, "rejected")
    prompt, responses = split_pair(chosen, rejected, HH_ASSISTANT)
    before, *parts = _HH_TURN.split(prompt.removesuffix(HH_ASSISTANT))
    if before.strip():
        raise Malformed("text before the first turn")
    names = {name: role for role, name in _HH_NAMES.items()}
    turns = [_turn(names[name], text.strip()) for name, text in zip(parts[::2], parts[1::2], strict=True)]
    yield Example(prompt, responses, tuple(turns), _opening(turns))


def read_tldr(fields: Fields) -> Iterator[Example]:
    answers: tuple[str, ...]
    if "summaries" in fields:
        info = _typed(fields, "info", dict)
        summaries = _typed(fields, "summaries", list)
        if len(summaries) != 2 or not all(isinstance(summary, dict) for summary in summaries):
            raise Malformed("field 'summaries' is not two objects")
        chosen = _choice(fields, "choice", (0, 1))
        prompt, answers = _tldr_prompt(info), (_text(summaries[chosen], "text"), _text(summaries[1 - chosen], "text"))
    elif "summary" in fields:
        prompt, answers = _tldr_prompt(fields), (_text(fields, "summary"),)
    elif "prompt" in fields and "rejected" in fields:
        prompt, answers = _text(fields, "prompt"), (_text(fields, "chosen"), _text(fields, "rejected"))
    elif "prompt" in fields:
        answer = next((name for name in ("label", "completion") if name in fields), None)
        if answer is None:
            raise Malformed(NO_LAYOUT)
        prompt, answers = _text(fields, "prompt"), (_text(fields, answer),)
    else:
        raise Malformed(NO_LAYOUT)
    yield one_turn(prompt.rstrip(), *(" " + answer.strip() for answer in answers))


def _tldr_prompt(post: Fields) -> str:
    subreddit, title, body = (_text(post, name).strip() for name in ("subreddit", "title", "post"))
    return f"SUBREDDIT: r/{subreddit.removeprefix('r/')}\n\nTITLE: {title}\n\nPOST: {body}\n\nTL;DR:"


def read_alpaca_farm(fields: Fields) -> Iterator[Example]:
    instruction = _text(fields, "instruction").strip()
    context = _text(fields, "input").strip() if fields.get("input") is not None else ""
    if not instruction:
        raise Malformed("field 'instruction' is empty")
    answers: tuple[str, ...] = ()
    if "preference" in fields:
        answers = _text(fields, "output_1").strip(), _text(fields, "output_2").strip()
        if _choice(fields, "preference", (1, 2)) == 2:
            answers = answers[::-1]
    elif "output" in fields:
        answers = (_text(fields, "output").strip(),)
    section = f"### Input:\n{context}\n\n" if context else ""
    prompt = f"### Instruction:\n{instruction}\n\n{section}### Response:\n"
    request = f"{instruction}\n\n{context}" if context else instruction
    yield Example(prompt, answers, (_turn("user", request),), request)


def read_chat(fields: Fields) -> Iterator[Example]:
    if "messages" in fields:
        turns = _turns(fields, "messages")
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant" and index:
                yield _chat(turns[:index], turn)
        if turns[-1]["role"] != "assistant":
            yield _chat(turns)
        return
    prompt = _turns(fields, "prompt") if isinstance(fields.get("prompt"), list) else []
    if "chosen" in fields:
        chosen, rejected = (prompt + _turns(fields, name) for name in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1]:
            raise Malformed("prompts differ")
        yield _chat(chosen[:-1], chosen[-1], rejected[-1])
    elif prompt:
        yield _chat(prompt, *(_turns(fields, "completion") if fields.get("completion") is not None else ()))
    else:
        raise Malformed(NO_LAYOUT)


def _turns(fields: Fields, name: str) -> list[Turn]:
    objects = _typed(fields, name, list)
    if not objects or not all(isinstance(turn, dict) for turn in objects):
        raise Malformed(f"field '{name}' is not a list of objects")
    turns = [_turn(_text(turn, "role"), _text(turn, "content").strip()) for turn in objects]
    if any(turn["role"] not in ("system", "user", "assistant") for turn in turns):
        raise Malformed(f"field '{name}' has a role that is none of system, user and assistant")
    return turns


def _chat(before: list[Turn], *answers: Turn) -> Example:
    if any(answer["role"] != "assistant" for answer in answers):
        raise Malformed("no assistant turn at the end")
    return Example(_hh_text(before), tuple(f" {turn['content']}" for turn in answers), tuple(before), _opening(before))


def read_prompts(fields: Fields) -> Iterator[Example]:
    _refuse_conversation(fields)
    yield one_turn(_text(fields, "prompt" if "prompt" in fields else "text"))


def read_training_rows(fields: Fields) -> Iterator[Example]:
    _refuse_conversation(fields)
    names = ("chosen", "rejected") if "chosen" in fields else ("response",) if "response" in fields else ()
    if "response" in fields and "chosen" in fields:
        raise Malformed("fields 'response' and 'chosen' are of different kinds of rows")
    yield one_turn(_text(fields, "prompt"), *(_text(fields, name) for name in names))


def _refuse_conversation(fields: Fields) -> None:
    if isinstance(fields.get("prompt"), list):
        raise Malformed("field 'prompt' is a conversation, which `nemo-eppo prepare chat` reads")


def nemo_aligner(assistant_marker: str = ALIGNER_ASSISTANT) -> Corpus:
    """Return the reader of NeMo-Aligner's files; in {"text"} pairs a response follows the last `assistant_marker`."""
    return Corpus(partial(_read_nemo_aligner, assistant_marker), _join_text_rows)


def _read_nemo_aligner(assistant_marker: str, fields: Fields) -> Iterator[Example]:
    if "conversations" in fields:
        yield from _conversation(fields)
    elif "text" in fields:
        good, bad = fields["text"]
        prompt, responses = split_pair(_text(good, "text"), _text(bad, "text"), assistant_marker)
        yield Example(prompt, responses, (), prompt)
    elif "chosen_response" in fields:
        answers = _text(fields, "chosen_response"), _text(fields, "rejected_response")
        yield one_turn(_text(fields, "prompt"), *answers)
    elif "output" in fields:
        yield one_turn(_text(fields, "input"), _text(fields, "output"))
    else:
        raise Malformed(NO_LAYOUT)


def _join_text_rows(rows: Iterator[Row]) -> Iterator[Row]:
    """Join every two {"text"} rows, a better and a worse text, to one row with both under "text".

    A malformed row makes its pair malformed, and does not shift the pairs after it.
    """
    for first, second in zip_longest(rows, rows):
        if "text" in first.fields or (second and "text" in second.fields):
            defect = first.defect or (second.defect if second else "no second row of the pair")
            if not defect and second:
                yield Row(first.file, first.line, {**first.fields, "text": (first.fields, second.fields)})
            else:
                yield Row(first.file, first.line, {}, defect)
        else:
            yield first
            if second:
                yield second


def _conversation(fields: Fields) -> Iterator[Example]:
    """Make one demonstration of each turn of the speaker that "mask" does not name."""
    masked = _text(fields, "mask")
    objects = _typed(fields, "conversations", list)
    if not all(isinstance(turn, dict) for turn in objects):
        raise Malformed("field 'conversations' is not a list of objects")
    speakers = [_text(turn, "from") for turn in objects]
    if masked not in speakers or len(set(speakers)) != 2:
        raise Malformed("field 'conversations' is not between the speaker in 'mask' and one other")
    system = _text(fields, "system").strip() if fields.get("system") is not None else ""
    turns = [_turn("system", system)] if system else []
    first = len(turns)
    turns += [
        _turn("user" if speaker == masked else "assistant", _text(turn, "value").strip())
        for speaker, turn in zip(speakers, objects, strict=True)
    ]
    trained = [index for index in range(first + 1, len(turns)) if turns[index]["role"] == "assistant"]
    if not trained:
        raise Malformed("no turn to train on")
    for index in trained:
        before = turns[:index]
        yield Example(_hh_text(before), (" " + turns[index]["content"],), tuple(before), _opening(before))


def one_turn(prompt: str, *responses: str) -> Example:
    return Example(prompt, responses, (_turn("user", prompt.strip()),), prompt.strip())


def split_pair(chosen: str, rejected: str, assistant_marker: str) -> tuple[str, tuple[str, str]]:
    """Split two texts into `(prompt, (chosen response, rejected response))`; a response follows the last marker.

    Raises:
        Malformed: one text has no marker, or the prompts differ.
    """
    prompt, marker, response = chosen.rpartition(assistant_marker)
    other_prompt, other_marker, other_response = rejected.rpartition(assistant_marker)
    if not (marker and other_marker):
        raise Malformed("no assistant turn")
    if prompt != other_prompt:
        raise Malformed("prompts differ")
    return prompt + marker, (response, other_response)


def _hh_text(turns: Iterable[Turn]) -> str:
    """Format a conversation as HH does, up to the start of the assistant's answer."""
    texts = [
        turn["content"] if turn["role"] == "system" else f"\n\n{_HH_NAMES[turn['role']]}: {turn['content']}"
        for turn in turns
    ]
    return "".join(texts) + HH_ASSISTANT


def _opening(turns: Iterable[Turn]) -> str:
    opening = next((turn["content"] for turn in turns if turn["role"] == "user"), "")
    if not opening:
        raise Malformed("no human turn")
    return opening


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


ValueT = TypeVar("ValueT")


def _typed(fields: Fields, name: str, kind: type[ValueT]) -> ValueT:
    if fields.get(name) is None:  # tables fill absent fields with null
        raise Malformed(f"field '{name}' is missing")
    value = fields[name]
    if not isinstance(value, kind):
        expected = {"str": "text", "list": "a list", "dict": "an object"}[kind.__name__]
        raise Malformed(f"field '{name}' is not {expected}")
    return value


def _text(fields: Fields, name: str) -> str:
    text = _typed(fields, name, str)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: legal JSON, but not text
        raise Malformed(f"field '{name}' is not valid Unicode") from None
    return text


def _choice(fields: Fields, name: str, allowed: tuple[int, int]) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or value not in allowed:
        raise Malformed(f"field '{name}' is not {allowed[0]} or {allowed[1]}")
    return allowed.index(value) + allowed[0]


CORPORA = {
    "hh": Corpus(read_hh),
    "tldr": Corpus(read_tldr),
    "alpaca_farm": Corpus(read_alpaca_farm),
    "chat": Corpus(read_chat),
    "prompts": Corpus(read_prompts),
    "rows": Corpus(read_training_rows),
    "nemo_aligner": nemo_aligner(),
}
