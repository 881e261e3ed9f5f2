#!/usr/bin/env bash
# The comparison of editing methods on the demo model, as docs/editing.md reports it: hours on two
# cores. What is there already is kept, so it can be stopped and started again; two of them, with
# other --methods and OMP_NUM_THREADS=1, do it in half the time.
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

settings=(--set multedit-all.through_update=true --set multedit-all.lr=1)
settings+=(--set multedit-all.steps=60 --set multedit-all.weight=1)
if [ "$kind" = invented ]; then
    # Of a word that nobody knows nothing says where it ends, and it takes more to have it said.
    settings+=(--target-end . --set multedit.through_update=true --set multedit.lr=1)
    settings+=(--set multedit.steps=60 --set constrained_fine_tune.bound=0.003)
else
    settings+=(--set multedit.weight=30)
fi

exec "${MMLENS:-.venv/bin/mmlens}" edit-bench --data "demo:$kind" --texts "$texts" \
    --methods multedit-all@17,multedit@17,rome@17,memit@15-17,constrained_fine_tune@17,fine_tune@17,lora@all,fine_tune@all \
    "${settings[@]}" --preserved demo --n-preserved 300 --n-preserved-whole 30 \
    --unrelated demo --n-unrelated 6 --out "docs/results/edit-bench/$kind" "$@"
