#!/usr/bin/env bash
# What the issue of speed asks of a GPU, measured in under ten minutes: one table, OUT/table.md, and the JSON behind it.
#
#     bash scripts/gpu_checklist.sh [DATASETS] [--out OUT] [--minutes 10] [--smoke]
#
# DATASETS is a folder with CIFAR-10 (cifar-10-batches-py); without one, scikit-learn's digits stand in and the table says
# so. --smoke runs everything in miniature, on the CPU too. Needs Python 3.11 and torch 2.10 or newer.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python}" scripts/gpu_checklist.py "$@"
