#!/usr/bin/env bash
# The runs behind the curve of ASR against the poisoning ratio: CPU recipe, real CIFAR-10. Repeat a call after an interruption,
# finished runs are skipped. ATTACKS and RATIOS name others.
#     bash docs/results/ratios.sh DATASETS RECORDS [SEED...]
set -u
here="$(cd "$(dirname "$0")/../.." && pwd)"
data=$1 root=$2
shift 2
[ $# -gt 0 ] || set -- 0
for seed in "$@"; do
  for name in ${ATTACKS:-badnet blended wanet}; do
    for ratio in ${RATIOS:-0 0.001 0.01 0.05 0.1}; do
      run="${name}_r${ratio}_s$seed"
      [ -f "$root/$run/manifest.json" ] || python "$here/attack/$name.py" --recipe cpu --device cpu --save_folder_name "$run" --pratio "$ratio" \
        --random_seed "$seed" --dataset_path "$data" --record_root "$root" --threads "${THREADS:-0}"
    done
  done
done
python "$here/scripts/ratios.py" "$root" --out "$root/ratios"
