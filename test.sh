#!/usr/bin/env bash
# Runs the whole test suite; arguments go to pytest:   ./test.sh   ./test.sh -k artifact
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tools/environment.sh
exec python -m pytest "$@"
