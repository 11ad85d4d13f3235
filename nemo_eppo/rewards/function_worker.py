"""The process in which reward functions run: it reads one JSON object per line, and answers each with another.

FunctionPool starts it with `python -m nemo_eppo.rewards.function_worker`. What a function prints goes to standard
error, because standard output carries the answers.
"""

import json
import math
import numbers
import os
import sys
from typing import Any

from nemo_eppo.config import load_named
from nemo_eppo.rewards.sample import Sample


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_answer(request["function"], request["sample"])), file=answers, flush=True)


def _answer(name: str, sample: dict[str, Any]) -> dict[str, Any]:
    try:
        function = load_named("function", name, "module:function")
        value = function(Sample(**sample | {"token_ids": tuple(sample["token_ids"])}))
        if isinstance(value, numbers.Real) and math.isfinite(value):
            return {"value": float(value)}
    except Exception as error:
        return {"error": f"raised {type(error).__name__}: {error}"}
    return {"error": f"gave {value!r}; expected a finite number"}


if __name__ == "__main__":
    main()
