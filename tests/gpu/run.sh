#!/usr/bin/env bash
# Shows whether the GPU path works, in a table for each part: bash tests/gpu/run.sh [--only PART ...] [--output DIR]
# The interpreter is $PYTHON or, where that is not set, that of .venv, or python3 where there is no .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || python=python3
exec "$python" tests/gpu/suite.py "$@"
