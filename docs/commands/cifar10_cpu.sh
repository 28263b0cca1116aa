#!/usr/bin/env bash
# The runs behind cifar10_cpu.md: CPU recipe, real CIFAR-10, three seeds. About two hours on two cores, best as
# THREADS=1 (which is what the page has, but for badnet seed 0: two threads) and one call a core with different seeds; repeat a call after an interruption, finished runs are skipped.
# ATTACKS and DEFENSES name others than the first three of each. DATASETS is a folder that exists.
#     bash docs/commands/cifar10_cpu.sh DATASETS RECORDS [SEED...]
set -u
here="$(cd "$(dirname "$0")/../.." && pwd)"
data=$1 root=$2
shift 2
settings() { # those of the table that the recipe has changed since
  case $1 in
    sau | at) echo --lr_scheduler constant ;;
    i-bau) echo --lr 1e-4 --lr_scheduler constant ;;
    wanet) echo --epochs 24 ;;
    inputaware) echo --epochs 10 --clean_train_epochs 2 --schedulerG_milestones 200,300,400,500 ;;
  esac
}
attack() {
  python "$here/attack/$1.py" --recipe cpu --device cpu --save_folder_name "$1_s$2" --random_seed "$2" --dataset_path "$data" --record_root "$root" \
    --amp true --threads "${THREADS:-0}" $(settings "$1")
}
defense() {
  python "$here/defense/$1.py" --device cpu --result_file "$2_s$3" --random_seed "$3" --record_root "$root" --amp true \
    --threads "${THREADS:-0}" $(settings "$1")
}
[ $# -gt 0 ] || set -- 0 1 2
for seed in "$@"; do
  for name in ${ATTACKS:-badnet blended prototype}; do
    [ -f "$root/${name}_s$seed/manifest.json" ] || attack "$name" "$seed"
    for method in ${DEFENSES-sau ft at}; do
      [ -f "$root/${name}_s$seed/defense/$method/manifest.json" ] || defense "$method" "$name" "$seed"
    done
  done
done
