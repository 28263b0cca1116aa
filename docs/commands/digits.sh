#!/usr/bin/env bash
# The runs behind digits.md: the demo's attack and defense on scikit-learn's digits, three seeds, a quarter of an hour on one thread.
#     bash docs/commands/digits.sh RECORDS
set -u
here="$(cd "$(dirname "$0")/../.." && pwd)"
for seed in 0 1 2; do
  python "$here/attack/badnet.py" --recipe cpu --device cpu --dataset digits --save_folder_name "badnet_s$seed" --random_seed "$seed" \
    --record_root "$1" --threads "${THREADS:-0}"
  python "$here/defense/sau.py" --device cpu --result_file "badnet_s$seed" --random_seed "$seed" \
    --epochs 50 --lr 3e-4 --lr_scheduler constant --batch_size 256 \
    --record_root "$1" --threads "${THREADS:-0}"
done
python "$here/scripts/tables.py" seeds "$1"
