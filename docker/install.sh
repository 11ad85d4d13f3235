#!/usr/bin/env bash
# Installs nemo_eppo into an image whose Python has torch, megatron-core and NeMo already, without changing any of them.
#
#   bash docker/install.sh [EXTRAS]        EXTRAS of setup.py, separated by commas
#
# PYTHON   the image's interpreter (python)
# SERVERS  a second environment for the PyTriton servers, made here (/opt/servers). It sees all that the image has,
#          but PyTriton 0.7 breaks on numpy 2, so it has a numpy of its own where the image's is newer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-}
python=${PYTHON:-python}
servers=${SERVERS:-/opt/servers}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore

"$python" -m pip --version >/dev/null || "$python" -m ensurepip
frozen=$(mktemp)
trap 'rm -f "$frozen"' EXIT

# installs what requirements.py finds missing for a kind of job; what there is already stays as it is
complete() { # interpreter, kind of job
    local missing
    "$1" docker/requirements.py frozen >"$frozen"
    missing=$("$1" docker/requirements.py missing "$2" "$extras")
    if [[ $missing ]]; then
        # the image's own constraints are of no use here: $frozen holds the versions that are installed
        echo "$missing" | PIP_CONSTRAINT='' xargs -d '\n' "$1" -m pip install --constraint "$frozen"
    fi
    missing=$("$1" docker/requirements.py missing "$2" "$extras")
    if [[ $missing ]]; then
        echo "install: still missing for $2:" "$missing" >&2
        return 1
    fi
}

echo "== nemo_eppo"
"$python" -m pip install --no-deps --no-build-isolation --editable .
complete "$python" actor

echo "== servers: $servers"
"$python" -m venv --without-pip "$servers"
# --system-site-packages would not do: the image's Python can be a virtual environment itself. Editable installs, which
# the NeMo images have, need the .pth files in there to be read, too.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
own=$("$servers/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$packages')" >"$own/image.pth"
complete "$servers/bin/python" server
"$servers/bin/python" -c 'import numpy, pytriton; print("servers: numpy", numpy.__version__)'
