# Sourced by run.sh and test.sh from the repository root: leaves .venv with requirements.txt installed, and active.

fail() { echo "error: $*" >&2; exit 1; }

python=${PYTHON:-}
for candidate in python3 python3.12 python3.11; do
    [ -n "$python" ] || ! command -v "$candidate" >/dev/null || ! "$candidate" -c \
        'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || python=$candidate
done
[ -n "$python" ] || fail "Python 3.11 or 3.12 is needed (apt install python3 python3-venv), or PYTHON must name one"

wanted=$("$python" -c 'import hashlib; print(hashlib.sha256(open("requirements.txt", "rb").read()).hexdigest())') \
    || fail "PYTHON=$python does not run"
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "python3-venv is missing: apt install python3-venv"
    echo "installing requirements.txt into .venv (a minute or two, once)"
    .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv || fail "cannot make .venv here: is there room and permission?"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt \
        || fail "pip could not install requirements.txt; the lines above say why, and running this again goes on from there"
    echo "$wanted" > .venv/installed
fi
source .venv/bin/activate
command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null \
    || echo "note: no C++ compiler (apt install g++): torch.compile is off on CPU, and training slower"
