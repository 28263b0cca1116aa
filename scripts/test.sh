#!/usr/bin/env bash
# Style, types and tests. `--all` adds the tests marked slow; anything else is handed to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
select=(-m "not slow")
if [ "${1:-}" = --all ]; then select=(); shift; fi
ruff check .
ruff format --check .
mypy
# One thread for each linear algebra call: the tests are small, and two libraries that each take all cores slow both.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" python -m pytest -q --jaxtyping-packages=sau,beartype.beartype "${select[@]}" "$@"
