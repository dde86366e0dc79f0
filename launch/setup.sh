# shellcheck shell=bash
# Sourced by demo.sh and test.sh, in the repository root: makes .venv ready, once.
# Needs bash and python3 (3.11 or newer; PYTHON=... names another) and the network, nothing else.

fail() {
  printf 'fusedit: %s\n' "$1" >&2
  exit 1
}

# Prints the first Python that is new enough.
find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  return 1
}

make_venv() {
  local python
  python=$(find_python) || fail "Python 3.11 or newer is needed and ${PYTHON:-python3} is not; install one"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python comes without venv or ensurepip: install them (Debian, Ubuntu: apt-get install python3-venv)"
  "$python" -m venv .venv || { rm -rf .venv && fail "$python -m venv .venv did not succeed"; }
}

# set_up EXTRAS: installs fusedit with EXTRAS, '' or '[dev]', unless nothing changed since it was.
set_up() {
  local stamp=.venv/fusedit.stamp hash installed='' noise=--progress-bar=on
  [[ -e .venv ]] || make_venv
  hash=$(.venv/bin/python -c '
import hashlib, pathlib
files = "pyproject.toml", "setup.py", "constraints.txt"
print(hashlib.sha256(b"".join(map(pathlib.Path.read_bytes, map(pathlib.Path, files)))).hexdigest(), pathlib.Path.cwd())
') || fail ".venv cannot be used: delete it and start again"
  if [[ -e $stamp ]]; then installed=$(<"$stamp"); fi
  # [dev] serves those who need less, too.
  if [[ $installed == "$hash "*"$1" ]]; then return; fi

  printf 'fusedit: installing into .venv; the first time takes minutes\n' >&2
  rm -f "$stamp"
  if [[ ! -t 1 ]]; then noise=--quiet; fi # a log needs no progress bars
  .venv/bin/python -m pip install --disable-pip-version-check "$noise" \
    -c constraints.txt -e ".$1" || fail 'the installation did not succeed; pip says why above'
  printf '%s %s' "$hash" "$1" >"$stamp"
}
