#!/usr/bin/env bash
# The whole story on scikit-learn's digits in a few minutes: poison, train, purify, measure, draw, and a conclusion in words.
# One thread, one precision and one recipe, so that everybody sees nearly the figures of the README.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
root="${1:-./record}"
same=(--record_root "$root" --device cpu --threads 1)
python attack/badnet.py --dataset digits --save_folder_name demo --overwrite true --recipe cpu --amp false "${same[@]}"
python defense/sau.py --result_file demo --amp false "${same[@]}"
python scripts/figures.py demo --defense sau "${same[@]}" >/dev/null
echo "The last features before and after, and all other figures: $root/demo/figures/features_sau.png"
