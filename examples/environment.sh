#!/usr/bin/env bash
# Makes the virtual environment .venv with everything that is needed to train, serve and test; or reuses it.
#
#   bash examples/environment.sh
#
# What was installed is noted in .venv/installed, so that a second run is done at once. Needs Python 3.11 or 3.12,
# access to a package index, 4 GB of disk. PYTHON=/path/to/python3.11 chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'environment: %s\n' "$@" >&2
    exit 1
}

usable() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

wanted=$({ echo "$PWD"; cat setup.py constraints.txt nemo_eppo/VERSION; } | sha256sum | cut -d ' ' -f 1)
if [[ -f .venv/installed && $(<.venv/installed) == "$wanted" ]] && usable .venv/bin/python; then
    exit 0
fi

# 1. the interpreter and what Debian packages apart from it
python=
for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    if usable "$candidate"; then
        python=$candidate
        break
    fi
done
[[ $python ]] || fail "no Python 3.11 or 3.12 found (looked for ${PYTHON:-python3.11, python3.12, python3})" \
    "on Debian: sudo apt-get install python3.11 python3.11-venv libpython3.11"
version=$("$python" -c 'import sys; print("{}.{}".format(*sys.version_info))')
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python cannot make virtual environments" \
    "on Debian: sudo apt-get install python$version-venv"
"$python" -c "
import ctypes, sysconfig
name = 'libpython$version.so.1.0'
try:
    ctypes.CDLL(sysconfig.get_config_var('LIBDIR') + '/' + name)
except OSError:
    ctypes.CDLL(name)" 2>/dev/null || fail "the library libpython$version.so.1.0 is missing; Triton's servers load it" \
    "on Debian: sudo apt-get install libpython$version"

# 2. the environment
if ! { usable .venv/bin/python && .venv/bin/python -m pip --version; } >/dev/null 2>&1; then
    echo "environment: making .venv with $python ($version)"
    "$python" -m venv --clear .venv
fi
rm -f .venv/installed

# 3. the packages
log=.venv/install.log
echo "environment: installing about 170 packages into .venv, a dot for each (a few minutes; all messages in $log)"
.venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --no-compile \
    --constraint constraints.txt --editable '.[dev]' 2>&1 | tee "$log" |
    awk '/^ *(Collecting|Obtaining)/ { printf "."; fflush() }
         /^Installing collected/ { printf "\nenvironment: unpacking\n"; fflush() }' ||
    fail "$(tail -n 20 "$log")" "the installation failed; see $log"
# on all cores, where pip takes one; packages hold files for newer Pythons, too, which this one does not compile
.venv/bin/python -m compileall -q -j 0 .venv/lib >>"$log" 2>&1 || true
echo "$wanted" >.venv/installed
echo "environment: ready, $(du -sh .venv | cut -f 1) in .venv"
