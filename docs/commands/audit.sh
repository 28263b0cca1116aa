#!/usr/bin/env bash
# The re-activation audit of BadNets and Blended, on the cells that configs/grid/fp32_cpu.yaml or table1_cpu.yaml leave in RECORDS
# (run with `--published none` where their results are published already, with the defenses of DEFENSES);
# OUT_badnet and OUT_blended (.md, .png, .svg) are means over the seeds.
#     bash docs/commands/audit.sh RECORDS OUT [SEED...]
set -eu
cd "$(dirname "$0")/../.."
root=$1 out=$2
shift 2
[ $# -gt 0 ] || set -- 0 1 2
for attack in ${ATTACKS:-badnet blended}; do
  python scripts/audit.py --record_root "$root" --result_file "${@/#/${attack}_s}" --control "${@/#/prototype_s}" \
    --defense ${DEFENSES:-ft i-bau ft-sam sau d3 fst} --threads "${THREADS:-0}"
  audits=()
  for seed in "$@"; do audits+=("$root/${attack}"_*"_s$seed"); done
  python scripts/audits.py "${audits[@]}" --out "${out}_$attack"
done
