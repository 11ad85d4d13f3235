"""Files of responses: rows of texts, or of the token ids that a run recorded."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nemo_eppo.config import ConfigError
from nemo_eppo.data.datasets import TokenIds
from nemo_eppo.data.jsonl import read_objects, text_fields
from nemo_eppo.data.tokenizer import Tokenizer, encode_in_blocks

_IDS = ("prompt_ids", "response_ids")
_RESPONSE_FIELDS = (*_IDS, "prompt", "response", "finished", "finish_reason", "index", "sample")


class Response(NamedTuple):
    """A response, its prompt, and the row they are from."""

    prompt: TokenIds
    response: TokenIds
    """With EOS if the row's token ids have it, or its text is finished."""
    row: dict[str, Any]
    line: int
    """From 1."""


def require_chat_template(tokenizer: Tokenizer, model: Path) -> None:
    """Raise ConfigError if --chat-template was given for a model whose tokenizer has no template."""
    if tokenizer.chat_template is None:
        raise ConfigError(f"--chat-template: the tokenizer of {model} has none")


def render_chat(tokenizer: Tokenizer, chat: Sequence[dict[str, str]]) -> str:
    """Render a chat up to the start of the model's next turn; ConfigError if the template refuses it."""
    from jinja2 import TemplateError

    try:
        return tokenizer.render_chat(chat, add_generation_prompt=True)
    except TemplateError as error:
        raise ConfigError(f"the tokenizer's chat template refuses this chat: {error}") from None


class _ParsedRow(NamedTuple):
    line: int
    row: dict[str, Any]
    text: tuple[str, ...]
    """Prompt and response; empty if the row has only token ids."""
    ids: tuple[list[int], ...]
    """Token ids of prompt and response; empty if the row has none."""
    finished: bool


def read_responses(
    path: Path,
    tokenizer: Tokenizer,
    vocab_size: int,
    longest: int,
    chat_template: bool = False,
    texts: tuple[str, str] = ("prompt", "response"),
) -> list[Response]:
    """Read rows {"prompt", "response"} or {"prompt_ids", "response_ids"} of a .jsonl or .jsonl.gz file.

    Token ids are taken as they are. Texts are tokenised as in training, prompts with BOS if the tokenizer adds it; EOS
    follows where the row has "finished": true or "finish_reason": "stop".

    Args:
        vocab_size: token ids have to be below it.
        longest: largest number of tokens of a prompt and its response together.
        chat_template: render the prompt as the user's turn of the tokenizer's chat template.
        texts: names of the fields that have prompt and response as text.

    Raises:
        ConfigError: a row is bad (the message names the first, by file and line), or there are none.
    """

    def encode(block: list[_ParsedRow]) -> list[tuple[list[int], ...]]:
        return _encode(block, tokenizer, chat_template)

    responses = []
    for parsed, encoded in encode_in_blocks(_read(path, vocab_size, chat_template, texts), encode):
        where = f"{path}:{parsed.line}"
        if isinstance(encoded, ConfigError):
            raise ConfigError(f"{where}: {encoded}")
        for field, ids in zip(_IDS if parsed.ids else texts, encoded, strict=True):
            if not ids:
                raise ConfigError(f"{where}: field '{field}' has no tokens; expected at least one")
        if sum(map(len, encoded)) > longest:
            sizes = " + ".join(str(len(ids)) for ids in encoded)
            raise ConfigError(f"{where}: {sizes} tokens are more than the model's window of {longest}")
        prompt, response = (np.array(ids, dtype=np.int32) for ids in encoded)
        responses.append(Response(prompt, response, parsed.row, parsed.line))
    if not responses:
        raise ConfigError(f"{path}: no rows")
    return responses


def _read(path: Path, vocab_size: int, chat_template: bool, texts: tuple[str, str]) -> Iterator[_ParsedRow]:
    for line, row in read_objects(path):
        where = f"{path}:{line}"
        has_ids = any(field in row for field in _IDS)
        ids = tuple(token_ids(row, field, where, vocab_size) for field in _IDS) if has_ids else ()
        if ids and chat_template:
            raise ConfigError(f"{where}: field '{_IDS[0]}' cannot be rendered with --chat-template")
        text = () if has_ids and texts[1] not in row else text_fields(row, texts, where)
        yield _ParsedRow(line, row, text, ids, row_finished(row, where))


def says_how_it_ended(row: dict[str, Any]) -> bool:
    """Return whether a row says how its response ended: by a field, or by token ids, which have EOS or not."""
    return any(name in row for name in ("finished", "finish_reason", "response_ids"))


def row_fields(row: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a row that belong to its prompt, for reward functions.

    They are in "fields", where runs and `nemo-eppo generate` write them, or else all that do not describe a response.
    """
    fields: dict[str, Any] = row.get("fields", {name: row[name] for name in row if name not in _RESPONSE_FIELDS})
    return fields


def row_finished(row: dict[str, Any], where: str) -> bool:
    """Return whether a row's response finished; ConfigError, which begins with `where`, if it is not true or false."""
    finished = row.get("finished", row.get("finish_reason") == "stop")
    if not isinstance(finished, bool):
        raise ConfigError(f"{where}: field 'finished' = {finished!r:.80}: expected true or false")
    return finished


def token_ids(row: dict[str, Any], field: str, where: str, vocab_size: int) -> list[int]:
    """Return the token ids in a field of a row; ConfigError, which begins with `where`, if it has others."""
    ids = row.get(field)
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise ConfigError(f"{where}: field '{field}' = {ids!r:.80}: expected a list of token ids below {vocab_size}")
    return ids


def _encode(block: list[_ParsedRow], tokenizer: Tokenizer, chat_template: bool) -> list[tuple[list[int], ...]]:
    """Return the token ids of every prompt and response."""
    texts = [parsed.text for parsed in block if not parsed.ids]
    prompts, responses = zip(*texts, strict=True) if texts else ((), ())
    if chat_template:
        prompts = tuple(render_chat(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts)
    encoded = iter(zip(tokenizer.encode_prompts(prompts), tokenizer.encode(responses), strict=True))
    ids: list[tuple[list[int], ...]] = []
    for parsed in block:
        if parsed.ids:
            if parsed.text and (decoded := tokenizer.decode(parsed.ids[1])) != parsed.text[1]:
                raise ConfigError(
                    f"field 'response_ids' are {decoded!r:.80} to this model's tokenizer, but field 'response' is "
                    f"{parsed.text[1]!r:.80}: expected token ids of the same tokenizer"
                )
            ids.append(parsed.ids)
        else:
            prompt, response = next(encoded)
            lacks_eos = parsed.finished and response[-1:] != [tokenizer.eos_id]
            ids.append((prompt, [*response, tokenizer.eos_id] if lacks_eos else response))
    return ids
