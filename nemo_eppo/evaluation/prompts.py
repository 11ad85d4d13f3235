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
    """As the row has it; a chat as its template renders it; of mere token ids, what they mean."""
    token_ids: list[int]
    fields: dict[str, Any]


class _Given(NamedTuple):
    line: int
    row: dict[str, Any]
    text: str | None
    """None where the row has nothing but token ids."""
    rendered: str
    """What is tokenised."""
    ids: list[int] | None
    """Token ids, where the row has them."""


def read_prompts(
    path: Path, tokenizer: Tokenizer, vocab_size: int, longest: int, chat_template: bool = False
) -> list[Prompt]:
    """Read rows {"prompt"} (text, or a list of {"role", "content"}) or {"prompt_ids"} of a .jsonl or .jsonl.gz file.

    Token ids are taken as they are. Texts are tokenised as in training, with BOS where the tokenizer adds it; a chat is
    rendered by the tokenizer's chat template first.

    Args:
        vocab_size: token ids have to be below it.
        longest: tokens that a prompt may have.
        chat_template: render texts as the user's turn of the chat template.

    Raises:
        ConfigError: the first row that is bad, by file and line, or there are none.
    """

    def encode(block: list[_Given]) -> list[list[int]]:
        encoded = iter(tokenizer.encode_prompts([given.rendered for given in block if given.ids is None]))
        return [next(encoded) if given.ids is None else given.ids for given in block]

    found = []
    for given, ids in encode_in_blocks(_read(path, tokenizer, vocab_size, chat_template), encode):
        where = f"{path}:{given.line}"
        if isinstance(ids, ConfigError):
            raise ConfigError(f"{where}: {ids}")
        if not 1 <= len(ids) <= longest:
            raise ConfigError(f"{where}: the prompt has {len(ids)} tokens; expected 1 to {longest}")
        text = tokenizer.decode(ids) if given.text is None else given.text
        others = {name: value for name, value in given.row.items() if name not in (_PROMPT, _IDS)}
        found.append(Prompt(text, ids, others))
    if not found:
        raise ConfigError(f"{path}: no rows")
    return found


def _read(path: Path, tokenizer: Tokenizer, vocab_size: int, chat_template: bool) -> Iterator[_Given]:
    for line, row in read_objects(path):
        where = f"{path}:{line}"
        ids = token_ids(row, _IDS, where, vocab_size) if _IDS in row else None
        if _IDS in row and chat_template:
            raise ConfigError(f"{where}: field '{_IDS}' cannot be rendered with --chat-template")
        if _IDS in row and _PROMPT not in row:
            yield _Given(line, row, None, "", ids)
        else:
            given = row.get(_PROMPT)
            text = "" if isinstance(given, list) else text_fields(row, (_PROMPT,), where)[0]
            try:
                if isinstance(given, list):
                    text = rendered = render_chat(tokenizer, _chat(given, tokenizer))
                else:
                    rendered = render_chat(tokenizer, [{"role": "user", "content": text}]) if chat_template else text
            except ConfigError as error:
                raise ConfigError(f"{where}: field '{_PROMPT}': {error}") from None
            yield _Given(line, row, text, rendered, ids)


def _chat(turns: list[Any], tokenizer: Tokenizer) -> list[dict[str, str]]:
    if tokenizer.chat_template is None:
        raise ConfigError("a chat, but the model's tokenizer has no chat template")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(name), str) for name in ("role", "content")):
            raise ConfigError(f'turn {number} = {turn!r:.80}: expected {{"role", "content"}} as texts')
    if not turns:
        raise ConfigError("a chat without turns")
    return turns
