#!/usr/bin/env bash
# Make the digits leaderboard again. Killed at any moment and started again, it goes on.
#   leaderboards/digits/regenerate.sh [SEEDS]        default 5
# The protocol: five training seeds, training seed i sampled with sampling seed i, 10,000 samples per
# cell, labels by exact quota. The committed records are older: three seeds, 2,000 samples, labels
# drawn.
# Two processes with one thread each, split so that each trains the teachers of its own methods.
set -euo pipefail
cd "$(dirname "$0")/../.."
seeds="${1:-5}"
workspace="${CMBENCH_WORKSPACE:-cmbench-out}"
run=(cmbench run --dataset digits --seeds "$seeds" --samples 10000 --labels quota
    --workspace "$workspace" --threads 1 --no-report)
{
    "${run[@]}" --method edm --nfe 1,2,3,4,5,8,9,17,35
    "${run[@]}" --method edm --nfe 1,2,3,4,5,8,9,17,35 --sampler ddim
    "${run[@]}" --method cd,cct,ect,ct,ict --nfe 1,2,4,8
} &
first=$!
"${run[@]}" --method sct,scd,pd,ict-deep --nfe 1,2,4,8 &
second=$!
trap 'kill $first $second 2>/dev/null || true' INT TERM
wait "$first"
wait "$second"
mkdir -p leaderboards/digits/records
cp -r "$workspace"/records/digits/. leaderboards/digits/records/
cmbench leaderboard render
