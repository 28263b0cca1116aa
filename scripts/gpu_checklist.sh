#!/usr/bin/env bash
# The speed targets of docs/performance.md on a GPU: whole runs, the benchmark, and the tests that need a card.
#
#     bash scripts/gpu_checklist.sh [DATASETS] [OUT]
#
# DATASETS is a folder with CIFAR-10; without one, or as "", scikit-learn's digits stand in. OUT [gpu_checklist] gets the
# logs, the JSON of the benchmark and the records, whose times, ACC and ASR are printed at the end. SMOKE=1 runs all in
# miniature on any device.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="${2:-gpu_checklist}"
mkdir -p "$out"
data=(--dataset digits)
[ -z "${1:-}" ] || data=(--dataset cifar10 --dataset_path "$1")
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python || echo python3)}"
root=(--record_root "$out/record" --overwrite true)
device=cuda paper=(--recipe paper --epochs 100 --eval_every 10) fast=(--recipe fast) purify=(--recipe paper)
steps=(--width 64 --steps 20 --repeats 3) updates=(--width 64 --batch_size 256 --steps 5 --repeats 3)
images=(--width 64 --images 4000 --repeats 3) whole=(--width 64 --images 50000 --epochs 3 --rounds 5 --repeats 1 --workers 4)
if [ -n "${SMOKE:-}" ]; then
  device=auto small=(--width 4 --batch_size 16 --repeats 1)
  paper=(--recipe cpu --width 4 --epochs 1) fast=("${paper[@]}") purify=(--epochs 1)
  steps=("${small[@]}" --steps 1) updates=("${small[@]}" --steps 1 --train_updates 2 --purify_updates 1)
  images=("${small[@]}" --images 20) whole=("${small[@]}" --images 320 --epochs 1 --rounds 1)
fi
"$python" attack/badnet.py "${data[@]}" "${root[@]}" "${paper[@]}" --save_folder_name paper --device $device
for defense in sau sau-sam; do
  "$python" defense/$defense.py "${root[@]}" "${purify[@]}" --result_file paper --device $device
done
"$python" attack/badnet.py "${data[@]}" "${root[@]}" "${fast[@]}" --save_folder_name fast --device $device
for part in train sau eval data runs; do
  case $part in sau) flags=("${updates[@]}") ;; eval) flags=("${images[@]}") ;; runs) flags=("${whole[@]}") ;; *) flags=("${steps[@]}") ;; esac
  "$python" scripts/bench.py $part "${data[@]}" "${flags[@]}" --device $device --json "$out/bench_$part.json"
done
[ -n "${SMOKE:-}" ] || "$python" -m pytest -q -m gpu
"$python" scripts/tables.py seeds "$out/record"
