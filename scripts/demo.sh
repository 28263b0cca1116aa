#!/usr/bin/env bash
# The whole story on scikit-learn's digits in a few minutes: poison, train, purify, measure, say what came of it, draw.
# One thread, one precision and one recipe, so that everybody sees nearly the figures of the README.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
root="${1:-./record}"
same="--device cpu --threads 1"
python attack/badnet.py --dataset digits --save_folder_name demo --record_root "$root" --overwrite true --recipe cpu --amp false $same
python defense/sau.py --result_file demo --record_root "$root" --amp false $same
python scripts/figures.py demo --defense sau --record_root "$root" $same
