#!/usr/bin/env bash
# Sets everything up and trains a tiny policy with the energy-loss penalty: examples/quickstart.py says what happens.
#
#   bash examples/quickstart.sh            # all of it
#   bash examples/quickstart.sh --help     # the options
set -euo pipefail
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")

bash "$here/environment.sh"
exec "$here/../.venv/bin/python" "$here/quickstart.py" "$@"
