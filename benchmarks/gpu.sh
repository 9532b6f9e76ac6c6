#!/usr/bin/env bash
# Everything that is worth measuring on a machine with one GPU, in one command:
#   bash benchmarks/gpu.sh
# The arms of benchmarks.run, then the table of all thirteen spaces, then a roofline. Results lie under $OUT.
# What is there already is not run again, so a run that was cut off goes on. By environment:
#   OUT (benchmarks/results/gpu)  DATA (cifar10)  WEIGHTS (imagenet)  DEVICE (cuda)  PRECISION (auto)
#   REPEAT (3)  WORKERS (2)  FAMILIES, SPACES, ARCHITECTURES (all; empty: none)
#   TRIALS (64) and EPOCHS (the space's) of the table;  ARMS, ARMS_TRIALS, ARMS_EPOCHS, ARMS_IMAGES (the family's)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-benchmarks/results/gpu} DATA=${DATA:-cifar10} WEIGHTS=${WEIGHTS:-imagenet} DEVICE=${DEVICE:-cuda}
PRECISION=${PRECISION:-auto} REPEAT=${REPEAT:-3} WORKERS=${WORKERS:-2} TRIALS=${TRIALS:-64}
FAMILIES=${FAMILIES-softmax twolayernn convnet mymodel resnet frozen study no-op}
SPACES=${SPACES-softmax twolayernn convnet mymodel resnet_softmax resnet_twolayernn resnet_conv resnet_mymodel
    resnet_softmax_updatable resnet_twolayernn_updatable resnet_conv_updatable resnet_mymodel_updatable
    resnet_finetune}
ARCHITECTURES=${ARCHITECTURES-softmax twolayernn convnet mymodel resnet_softmax_updatable}
mkdir -p "$OUT"

for family in $FAMILIES; do
    if [ -e "$OUT/$family.json" ]; then continue; fi
    # shellcheck disable=SC2086  # ARMS is a list
    python -m benchmarks.run ${ARMS:-} --family "$family" --data "$DATA" --weights "$WEIGHTS" \
        --device "$DEVICE" --workers "$WORKERS" --repeat "$REPEAT" --out "$OUT" \
        ${ARMS_TRIALS:+--trials "$ARMS_TRIALS"} ${ARMS_EPOCHS:+--epochs "$ARMS_EPOCHS"} \
        ${ARMS_IMAGES:+--images "$ARMS_IMAGES"}
done

for space in $SPACES; do
    study=$OUT/studies/$space
    if grep -qs '"status": "done"' "$study/study.json"; then continue; fi
    begin=(--space "$space" --data "$DATA" --weights "$WEIGHTS" --device "$DEVICE" --precision "$PRECISION"
        --trials "$TRIALS" --wandb off --study-dir "$study" ${EPOCHS:+--epochs "$EPOCHS"})
    if [ -e "$study/study.json" ]; then begin=(--resume "$study"); fi
    python search/run.py "${begin[@]}"
done
if [ -n "$SPACES" ]; then python -m analysis.results "$OUT"/studies/* | tee "$OUT/table.md"; fi

if [ -n "$ARCHITECTURES" ]; then
    # shellcheck disable=SC2086
    python -m benchmarks.roofline $ARCHITECTURES --data "$DATA" --device "$DEVICE" --precision "$PRECISION" |
        tee "$OUT/roofline.txt"
fi
