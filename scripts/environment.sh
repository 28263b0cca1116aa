# Sourced by demo.sh and test.sh: makes `python` the one of an environment that has the library and its tools.
# An active virtual environment is used as it is found; otherwise .venv in the repository is made.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    echo "making the environment .venv (once; PyTorch is large)"
    python3 -m venv .venv || { echo "python3 cannot make a virtual environment; install your system's python3-venv" >&2; exit 1; }
  fi
  VIRTUAL_ENV="$PWD/.venv"
  export VIRTUAL_ENV PATH="$PWD/.venv/bin:$PATH"
fi
wanted=$(cat setup.py requirements.txt | cksum)
if [ "$(cat "$VIRTUAL_ENV/.sau-installed" 2>/dev/null)" != "$wanted" ]; then
  python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
  echo "$wanted" >"$VIRTUAL_ENV/.sau-installed"
fi
