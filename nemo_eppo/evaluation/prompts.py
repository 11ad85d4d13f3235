"""Files of prompts: rows of texts, of chats, or of token ids."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nemo_eppo.config import ConfigError
from nemo_eppo.data.jsonl import read_objects, text_fields
from nemo_eppo.data.tokenizer import Tokenizer, encode_in_blocks
from nemo_eppo.evaluation.responses import render_chat, token_ids

_PROMPT, _IDS = "prompt", "prompt_ids"


class Prompt(NamedTuple):
    """A prompt, and the other fields of its row."""

    text: str
    """The row's text, its chat as rendered by the template, or its decoded token ids."""
    token_ids: list[int]
    fields: dict[str, Any]


class _ParsedRow(NamedTuple):
    line: int
    row: dict[str, Any]
    text: str | None
    """None if the row has only token ids."""
    rendered: str
    """The text to tokenise."""
    ids: list[int] | None
    """Token ids, if the row has them."""


def read_prompts(
    path: Path, tokenizer: Tokenizer, vocab_size: int, longest: int, chat_template: bool = False
) -> list[Prompt]:
    """Read rows {"prompt"} (text, or a list of {"role", "content"}) or {"prompt_ids"} of a .jsonl or .jsonl.gz file.

    Token ids are taken as they are. Texts are tokenised as in training, with BOS where the tokenizer adds it; a chat is
    rendered by the tokenizer's chat template first.

    Args:
        vocab_size: token ids have to be below it.
        longest: largest number of tokens of a prompt.
        chat_template: render texts as the user's turn of the chat template.

    Raises:
        ConfigError: a row is bad (the message names the first, by file and line), or there are none.
    """

    def encode(block: list[_ParsedRow]) -> list[list[int]]:
        encoded = iter(tokenizer.encode_prompts([parsed.rendered for parsed in block if parsed.ids is None]))
        return [next(encoded) if parsed.ids is None else parsed.ids for parsed in block]

    prompts = []
    for parsed, ids in encode_in_blocks(_read(path, tokenizer, vocab_size, chat_template), encode):
        where = f"{path}:{parsed.line}"
        if isinstance(ids, ConfigError):
            raise ConfigError(f"{where}: {ids}")
        if not 1 <= len(ids) <= longest:
            raise ConfigError(f"{where}: the prompt has {len(ids)} tokens; expected 1 to {longest}")
        text = tokenizer.decode(ids) if parsed.text is None else parsed.text
        others = {name: value for name, value in parsed.row.items() if name not in (_PROMPT, _IDS)}
        prompts.append(Prompt(text, ids, others))
    if not prompts:
        raise ConfigError(f"{path}: no rows")
    return prompts


def _read(path: Path, tokenizer: Tokenizer, vocab_size: int, chat_template: bool) -> Iterator[_ParsedRow]:
    for line, row in read_objects(path):
        where = f"{path}:{line}"
        ids = token_ids(row, _IDS, where, vocab_size) if _IDS in row else None
        if _IDS in row and chat_template:
            raise ConfigError(f"{where}: field '{_IDS}' cannot be rendered with --chat-template")
        if _IDS in row and _PROMPT not in row:
            yield _ParsedRow(line, row, None, "", ids)
        else:
            prompt = row.get(_PROMPT)
            text = "" if isinstance(prompt, list) else text_fields(row, (_PROMPT,), where)[0]
            try:
                if isinstance(prompt, list):
                    text = rendered = render_chat(tokenizer, _checked_chat(prompt, tokenizer))
                else:
                    rendered = render_chat(tokenizer, [{"role": "user", "content": text}]) if chat_template else text
            except ConfigError as error:
                raise ConfigError(f"{where}: field '{_PROMPT}': {error}") from None
            yield _ParsedRow(line, row, text, rendered, ids)


def _checked_chat(turns: list[Any], tokenizer: Tokenizer) -> list[dict[str, str]]:
    if tokenizer.chat_template is None:
        raise ConfigError("a chat, but the model's tokenizer has no chat template")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(name), str) for name in ("role", "content")):
            raise ConfigError(f'turn {number} = {turn!r:.80}: expected {{"role", "content"}} as texts')
    if not turns:
        raise ConfigError("a chat without turns")
    return turns
