#!/usr/bin/env bash
# Sets everything up, then lint, types, imports and tests. Arguments go to pytest: bash tests/run.sh tests/algorithms -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash examples/environment.sh
export OMP_NUM_THREADS=1 # parallel ranks share the cores
export CUDA_VISIBLE_DEVICES="" # GPUs have tests of their own, tests/gpu/run.sh

echo "== lint"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
echo "== types"
.venv/bin/mypy
echo "== imports"
.venv/bin/lint-imports
echo "== tests"
# three processes, a file of tests to each: much of the time is spent waiting for jobs and servers to start
exec .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
