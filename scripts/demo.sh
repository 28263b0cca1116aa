#!/usr/bin/env bash
# The whole story on scikit-learn's digits in a few minutes: poison, train, purify, measure, draw.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
root="${1:-./record}"
python attack/badnet.py --dataset digits --save_folder_name demo --record_root "$root" --overwrite true
python defense/sau.py --result_file demo --record_root "$root"
python scripts/figures.py demo --record_root "$root"
