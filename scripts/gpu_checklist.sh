#!/usr/bin/env bash
# The speed targets of docs/performance.md on a GPU, in under ten minutes,
# and the tests that need a card (with pip install -e '.[test]'): a table, OUT/table.md, and the JSON behind it.
#
#     bash scripts/gpu_checklist.sh [DATASETS] [--out OUT] [--minutes 10] [--smoke]
#
# DATASETS is a folder with CIFAR-10 (cifar-10-batches-py); without one, scikit-learn's digits stand in and the table says
# so. --smoke runs everything in miniature, on the CPU too. Needs Python 3.11 and torch 2.10 or newer.
set -eu
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
own="$here/../.venv/bin/python" # of scripts/demo.sh
[ -x "$own" ] || own="$(command -v python || echo python3)"
exec "${PYTHON:-$own}" "$here/gpu_checklist.py" "$@"
