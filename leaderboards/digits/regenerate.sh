#!/usr/bin/env bash
# Make the digits leaderboard again. Killed at any moment and started again, it goes on.
#   leaderboards/digits/regenerate.sh [SEEDS]        default 3
set -euo pipefail
cd "$(dirname "$0")/../.."
seeds="${1:-3}"
workspace="${CMBENCH_WORKSPACE:-cmbench-out}"
run=(cmbench run --dataset digits --seeds "$seeds" --workspace "$workspace" --threads 1 --no-report)
"${run[@]}" --method edm --nfe 1,2,4,8,35
"${run[@]}" --method edm --nfe 1,2,4,8,35 --sampler ddim
"${run[@]}" --method cd,ct,cct,ict,ict-deep,ect,sct,scd,pd --nfe 1,2,4,8
mkdir -p leaderboards/digits/records
cp -r "$workspace"/records/digits/. leaderboards/digits/records/
cmbench leaderboard render
