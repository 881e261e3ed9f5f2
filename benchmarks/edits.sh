#!/usr/bin/env bash
# The comparison of editing methods on the demo model, as docs/editing.md reports it: hours on two
# cores. What is there already is kept, so it can be stopped and started again.
#
#     benchmarks/edits.sh [correct|invented|counterfactual] [further options of mmlens edit-bench]
set -euo pipefail
kind="${1:-correct}"
shift || true
cd "$(dirname "$0")/.."

# ROME and MEMIT want text for the covariance of their keys; this is what a checkout holds.
texts=docs/results/edit-bench/texts.txt
mkdir -p "$(dirname "$texts")"
[ -s "$texts" ] || cat LICENSE README.md docs/*.md > "$texts"

exec "${MMLENS:-.venv/bin/mmlens}" edit-bench --data "demo:$kind" --texts "$texts" \
    --methods multedit-all@17,multedit@17,rome@17,memit@15-17,constrained_fine_tune@17,fine_tune@17,lora@all,fine_tune@all \
    --set multedit.weight=30 --set multedit-all.weight=1 --set multedit-all.reach=0.9 \
    --preserved demo --n-preserved 300 --n-preserved-whole 30 \
    --unrelated demo --n-unrelated 6 --out "docs/results/edit-bench/$kind" "$@"
