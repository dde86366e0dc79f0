#!/usr/bin/env bash
# Sets up .venv where that is not done, then runs the demo: the whole job on a drawn world, with its
# results in runs/demo. Arguments go to `fusedit demo`; --quick is the short form.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
set_up ''
exec .venv/bin/fusedit demo "$@"
