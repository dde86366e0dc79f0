#!/usr/bin/env bash
# Sets up .venv where that is not done, then runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
set_up '[dev]'
export OMP_NUM_THREADS=1 # of each of the processes below
exec .venv/bin/python -m pytest -m 'not slow' --numprocesses logical --maxprocesses 4 --dist loadfile "$@"
