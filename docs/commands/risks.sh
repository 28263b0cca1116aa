#!/usr/bin/env bash
# The risks while AT and SAU purify BadNets, Blended and WaNet, on the attacks that cifar10_cpu.sh leaves (seed 0):
#   ATTACKS="badnet blended wanet" DEFENSES="" bash docs/commands/cifar10_cpu.sh DATASETS RECORDS 0
#   bash docs/commands/risks.sh RECORDS
# What purifies is kept in defense/at_risk and defense/sau_risk, beside the finished runs without risks.
set -eu
cd "$(dirname "$0")/../.."
track=(--record_root "$1" --eval_every 1 --track_risk true --risk_samples 400 --risk_steps 10 --risk_restarts 1)
for attack in badnet blended wanet; do
  for defense in at sau; do
    python "defense/$defense.py" --result_file "${attack}_s0" --save_folder_name "${defense}_risk" \
      --lr_scheduler constant "${track[@]}" --threads "${THREADS:-0}"
  done
  python scripts/figures.py "${attack}_s0" --record_root "$1" --defense sau_risk --eps 0.1
done
python scripts/tables.py gaps "$1/badnet_s0" "$1/blended_s0" "$1/wanet_s0"
