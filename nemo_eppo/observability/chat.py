"""Splits the text of a chat into turns: the markers of the usual templates become roles, others stay in the text."""

import re
from typing import NamedTuple

_ROLE = re.compile(  # a turn's beginning: Qwen; Llama 3; Gemma; Phi-3; Mistral
    r"<\|im_start\|>(\w+)\n|<\|start_header_id\|>(\w+)<\|end_header_id\|>\s*|<start_of_turn>(\w+)\n"
    r"|<\|(system|user|assistant)\|>\n?|\[(/?INST)\]"
)
_MISTRAL = {"INST": "user", "/INST": "assistant"}
_EDGE = r"(?:<\|(?:begin_of_text|end_of_text|endoftext|im_end|eot_id|end)\|>|</?s>|<(?:bos|eos|end_of_turn)>)"
_EDGES = re.compile(rf"^(?:\s*{_EDGE})+|(?:{_EDGE}\s*)+$")  # inside of a text, <s> may be the text's own


class Turn(NamedTuple):
    """What one side of a chat says."""

    role: str
    """As the template names it, for instance user, assistant or model; empty where no marker says."""
    text: str


def turns(text: str) -> list[Turn]:
    """Return the turns of a text, those without words left out; a text without markers is one turn without a role."""
    before, *parts = _ROLE.split(text)
    found = [Turn("", before)]
    width = _ROLE.groups + 1
    for start in range(0, len(parts), width):
        *roles, said = parts[start : start + width]
        role = next(filter(None, roles))
        found.append(Turn(_MISTRAL.get(role, role), said))
    return [Turn(role, said) for role, said in ((role, _EDGES.sub("", said)) for role, said in found) if said.strip()]
