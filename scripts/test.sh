#!/usr/bin/env bash
# Style, types and tests. `--all` adds the tests marked slow; anything else is handed to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
select=(-m "not slow")
if [ "${1:-}" = --all ]; then select=(); shift; fi
ruff check .
ruff format --check .
mypy
unset PYTHONDONTWRITEBYTECODE # or every process rewrites the assertions of every test anew
# The bash of macOS takes an empty list for an unset one, so its elements are named only where there are some.
# A file to a process, a process to a core, a thread to a process: linear algebra libraries that each take all cores slow all.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" python -m pytest -q -n auto --maxprocesses 8 --dist loadfile \
  --jaxtyping-packages=sau,beartype.beartype ${select[@]+"${select[@]}"} "$@"
