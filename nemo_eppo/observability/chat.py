"""Splits the text of a chat into turns with roles, by the markers of common templates; other markers stay."""

import re
from typing import NamedTuple

_ROLE = re.compile(  # the marker at the start of a turn: Qwen; Llama 3; Gemma; Phi-3; Mistral
    r"<\|im_start\|>(\w+)\n|<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*|<start_of_turn>(\w+)\n"
    r"|<\|(system|user|assistant)\|>\n?|\[(/?INST)\]"
)
_MISTRAL = {"INST": "user", "/INST": "assistant"}
_EDGE = r"(?:<\|(?:begin_of_text|end_of_text|endoftext|im_end|eot_id|end)\|>|</?s>|<(?:bos|eos|end_of_turn)>)"
_EDGES = re.compile(rf"^(?:\s*{_EDGE})+|(?:{_EDGE}\s*)+$")  # only at the ends: inside, <s> may be the writer's


class Turn(NamedTuple):
    """One message of a chat."""

    role: str
    """The template's name, for instance user, assistant or model; empty without a marker."""
    text: str


def turns(text: str) -> list[Turn]:
    """Return the turns of a text, without empty ones; a text without markers is one turn without a role."""
    before, *parts = _ROLE.split(text)
    split = [Turn("", before)]
    width = _ROLE.groups + 1
    for start in range(0, len(parts), width):
        *roles, content = parts[start : start + width]
        role = next(filter(None, roles))
        split.append(Turn(_MISTRAL.get(role, role), content))
    stripped = (Turn(turn.role, _EDGES.sub("", turn.text)) for turn in split)
    return [turn for turn in stripped if turn.text.strip()]
