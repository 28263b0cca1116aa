#!/usr/bin/env bash
# The re-activation audit of BadNets and Blended, on the records that cifar10_cpu.sh or configs/grid/table1_cpu.yaml leave:
# (`--published none` where their summaries are published already, with the defenses of DEFENSES);
# OUT_badnet and OUT_blended (.md, .png, .svg) are means over the seeds. Finished pieces are not repeated.
#     bash docs/commands/audit.sh RECORDS OUT [SEED...]
set -eu
cd "$(dirname "$0")/../.."
root=$1 out=$2
shift 2
[ $# -gt 0 ] || set -- 0 1 2
record() { # the only folder of an attack and a seed, whatever ratio and digest stand between
  local found=("$root/$1"*"_s$2")
  [ -d "${found[0]}" ] && [ ${#found[@]} = 1 ] || { echo "error: $root has not one $1 of seed $2" >&2; exit 2; }
  echo "${found[0]}"
}
for attack in ${ATTACKS:-badnet blended}; do
  audits=()
  for seed in "$@"; do
    place=$(record "$attack" "$seed")
    clean=$(record prototype "$seed")
    python scripts/audit.py --result_file "$place" --defense ${DEFENSES:-ft i-bau ft-sam sau d3 fst} --control "$clean" \
      --control_defense sau --threads "${THREADS:-0}"
    audits+=("$place")
  done
  python scripts/audits.py "${audits[@]}" --out "${out}_$attack"
done
