#!/usr/bin/env bash
# The runs behind the fast recipe's figures in docs/performance.md: each seed by the recipe cpu and by fast_cpu, real CIFAR-10.
#     bash docs/commands/fast_cpu.sh DATASETS RECORDS [SEED...]
set -u
here="$(cd "$(dirname "$0")/../.." && pwd)"
data=$1 root=$2
shift 2
[ $# -gt 0 ] || set -- 0 1 2
for seed in "$@"; do
  for name in ${ATTACKS:-badnet blended}; do
    for recipe in cpu fast_cpu; do
      [ -f "$root/$recipe/${name}_s$seed/manifest.json" ] || python "$here/attack/$name.py" --recipe "$recipe" --amp true \
        --save_folder_name "${name}_s$seed" --random_seed "$seed" --dataset_path "$data" --record_root "$root/$recipe" \
        --threads "${THREADS:-0}"
    done
  done
done
for recipe in cpu fast_cpu; do python "$here/scripts/seeds.py" "$root/$recipe"; done
