#!/usr/bin/env bash
# Measure what a machine with one GPU can tell:  bash benchmarks/gpu.sh PART…
#   tests   tests/gpu                                                                      2 min at most
#   epoch   decoding; images/s and share of the peak of every space, eager and captured    1
#   kill    kill -9 in the middle of a study of real images, --resume, compared            1
#   share   images/s of 1, 2 and 4 trials at once on the GPU                               1
#   rows    the table of all thirteen spaces: a search and three fresh seeds each          9
#   lr      lr against accuracy, for the five spaces whose backbone is trained             5
# Each part ends at its bound and leaves in $OUT what it has by then, eight files of 16 MiB at most: log.txt,
# PART.txt, and of rows and lr tables.txt, studies.tar.xz (the next run needs it) and best.tar.xz (predictions).
# What an earlier run left in $RESULTS is skipped: finished studies; of the other parts, those that ended well at
# this commit. A study that the bound stopped is resumed; one whose best lr is at the edge of its grid is extended.
#
# On a bare machine without Ray and a network (Python 3.12, torch 2.11), everything travels in .gpu/:
#   here:   bash ../shared/gpu/pack.sh; git describe --always --dirty --abbrev=12 > .gpu/commit
#   there:  carry [".gpu"], command  bash benchmarks/gpu.sh tests epoch kill   (timeout_s 330)
#           carry [".gpu"], command  bash benchmarks/gpu.sh rows               (timeout_s 600)
#   between: mkdir -p .gpu/results; cp FILES_AT/*.txt FILES_AT/studies.tar.xz .gpu/results/
# Without .gpu/unpack.sh Python, images and the rest come from the environment:
#   OUT (benchmarks/results/gpu)  RESULTS (.gpu/results)  WORK (/tmp/tunefleet-gpu)  PYTHON (python3)
#   DATA (/tmp/data/cifar10-jpeg.tar.xz)  WEIGHTS (/tmp/data/resnet18-imagenet.pth)  DEVICE (cuda)
#   LANES (4): studies at once, since half of a short study is the start of its processes
#   BOUND: seconds of each part, instead of its own     ROWS: which rows, of rows and lr (all)
#   SMALL=1: a rehearsal, 2 trials of 1 epoch
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OUT=${OUT:-benchmarks/results/gpu} RESULTS=${RESULTS:-.gpu/results} WORK=${WORK:-/tmp/tunefleet-gpu}
export PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} LANES=${LANES:-4} SMALL=${SMALL:-}
export PYTHONPATH=${PYTHONPATH:-$PWD/src} COLUMNS=${COLUMNS:-110} WANDB_MODE=disabled
if [ -f .gpu/commit ]; then TUNEFLEET_COMMIT=$(cat .gpu/commit) && export TUNEFLEET_COMMIT; fi # no git is there
if [ -f .gpu/unpack.sh ] && ! "$PYTHON" -c 'import sys, importlib.util as u; sys.exit(not u.find_spec("ray"))'; then
    # shellcheck disable=SC1091
    . .gpu/unpack.sh
fi
export DATA=${DATA:-/tmp/data/cifar10-jpeg.tar.xz} WEIGHTS=${WEIGHTS:-/tmp/data/resnet18-imagenet.pth}

declare -A BOUNDS=([tests]=120 [epoch]=60 [kill]=60 [share]=60 [rows]=540 [lr]=300)
STOP_SECONDS=${STOP_SECONDS:-20} # in which a study that is stopped has to end
# The longest first, so that the lanes end together. lr and, where the published one is far from the others, a
# width or two are left to search; the other values were found by hand (docs/gpu.md).
TUNED="momentum=0.9 weight_decay=0.0005 batch_size=128 augment=crop_flip label_smoothing=0 warmup_epochs=0.5"
declare -A FLAGS=(
    [resnet_softmax_updatable]="--trials 3 --epochs 8 --fix $TUNED"
    [resnet_finetune]="--trials 3 --epochs 8 --fix $TUNED"
    [resnet_twolayernn_updatable]="--trials 3 --epochs 8 --fix $TUNED"
    [resnet_conv_updatable]="--trials 3 --epochs 8 --fix $TUNED"
    [resnet_mymodel_updatable]="--trials 4 --epochs 12 --fix hidden=128 $TUNED"
    [mymodel]="--trials 4 --epochs 14 --fix hidden=64 kernel_size=3 optimizer=adam augment=crop_flip
        weight_decay=0 momentum=0 warmup_epochs=0.5"
    [resnet_mymodel]="--trials 4 --epochs 18 --fix hidden=128 momentum=0.95 batch_size=128 weight_decay=0.0005"
    [resnet_conv]="--trials 4 --epochs 15 --fix hidden=150 momentum=0.9 batch_size=128 weight_decay=0.001"
    [convnet]="--trials 6 --epochs 15 --fix hidden=50 kernel_size=7 augment=crop_flip weight_decay=0.001"
    [resnet_twolayernn]="--trials 24 --epochs 27"
    [resnet_softmax]="--trials 9 --epochs 27"
    [twolayernn]="--trials 12 --epochs 27 --fix hidden=1000"
    [softmax]="--trials 32 --epochs 27"
)
ORDER="resnet_softmax_updatable resnet_finetune resnet_twolayernn_updatable resnet_conv_updatable
    resnet_mymodel_updatable mymodel resnet_mymodel resnet_conv convnet resnet_twolayernn resnet_softmax
    twolayernn softmax"
LR_ORDER="resnet_softmax_updatable resnet_finetune resnet_twolayernn_updatable resnet_conv_updatable
    resnet_mymodel_updatable"
LRS="3e-4 1e-3 3e-3 1e-2 3e-2 1e-1 3e-1"
LR_FLAGS="--lrs $LRS --epochs 3 --seeds 1"
if [ -n "$SMALL" ]; then LR_FLAGS="--lrs 1e-3 1e-2 --epochs 1 --seeds 1"; fi

say() { # text…: a line for the log
    echo "$(date +%H:%M:%S) $*" | tee -a "$OUT/log.txt"
}

left() { # seconds until the part has to end
    echo $((DEADLINE - $(date +%s)))
}

bounded() { # seconds, command…: SIGINT at the bound, SIGKILL some seconds later
    local seconds=$1
    shift
    # SIGINT is ignored in what a script starts in the background, and Python then keeps ignoring it
    timeout --foreground --preserve-status --signal=INT --kill-after=$STOP_SECONDS "$seconds" \
        env --default-signal=INT "$@"
}

keep() { # all studies so far: the next run needs it in one archive, what people look at in another
    "$PYTHON" - <<'P'
import contextlib, os, pathlib, tarfile
out, work = pathlib.Path(os.environ["OUT"]), pathlib.Path(os.environ["WORK"])
large = 10**6  # bytes: a first layer above is left out
def wanted(file, best):
    parts = file.relative_to(work).parts[2:]
    if {"checkpoints", "ray", "wandb", ".lock", "model.pt"} & {*parts} or not file.is_file():
        return False
    return (parts[0] == "best") == best and (file.name != "first_layer.npy" or file.stat().st_size < large)
for name in ("studies", "best"):
    partial = out / f"{name}.{os.getpid()}"
    with tarfile.open(partial, "w:xz", preset=1) as tar:
        for part in ("rows", "lr"):
            for file in sorted((work / part).rglob("*")):
                if wanted(file, name == "best"):
                    with contextlib.suppress(FileNotFoundError):  # of a study that runs in another lane
                        tar.add(file, file.relative_to(work))
    partial.replace(out / f"{name}.tar.xz")
P
}

is_done() { # folder: whether its study is finished
    grep -qs '"status": "done"' "$1/result.json"
}

at_edge() { # folder: whether the best lr of its learning-rate study lies at the grid's edge
    "$PYTHON" - "$1" <<'P'
import pathlib, sys
from tunefleet.search.lr_study import extension
try:
    extension(pathlib.Path(sys.argv[1]))
except ValueError:
    sys.exit(1)
P
}

rows() { # space: searches it, unless that is done
    local study=$WORK/rows/$1 small=() began=$SECONDS code=0
    if is_done "$study"; then say "rows: $1 is there"; return; fi
    if [ "$(left)" -lt $((2 * STOP_SECONDS)) ]; then say "rows: no time left for $1"; return; fi
    if [ -n "$SMALL" ]; then small=(--trials 2 --epochs 1 --final-seeds 1); fi
    # shellcheck disable=SC2206  # flags are words
    local begin=(--space "$1" --data "$DATA" --device "$DEVICE" ${FLAGS[$1]} "${small[@]}" --study-dir "$study")
    if [ "${1#resnet}" != "$1" ]; then begin+=(--weights "$WEIGHTS"); fi
    if [ -e "$study/study.json" ]; then begin=(--resume "$study"); fi
    say "rows: $1 begins, $(left) s left"
    bounded $(($(left) - STOP_SECONDS)) "$PYTHON" search/run.py "${begin[@]}" --data-dir "$WORK/cache" \
        --wandb off >"$WORK/$1.out" 2>&1 || code=$?
    sed "s/^/$1: /" "$WORK/$1.out" >>"$OUT/log.txt"
    say "rows: $1 ended with $code after $((SECONDS - began)) s: $(grep -h test_accuracy "$WORK/$1.out")"
    keep
}

lr() { # space: its learning-rate study, or an extension of that
    local study=$WORK/lr/$1 began=$SECONDS code=0
    local begin=(--space "$1" --data "$DATA" --weights "$WEIGHTS" --device "$DEVICE" --study-dir "$study")
    if is_done "$study"; then
        if ! at_edge "$study"; then say "lr: $1 is there"; return; fi
        begin=(--extend "$study")
    elif [ -e "$study/study.json" ]; then
        begin=(--resume "$study")
    else
        if is_done "$WORK/rows/$1"; then begin+=(--from "$WORK/rows/$1"); else say "lr: $1 has no row"; fi
        # shellcheck disable=SC2206
        begin+=($LR_FLAGS)
    fi
    if [ "$(left)" -lt $((2 * STOP_SECONDS)) ]; then say "lr: no time left for $1"; return; fi
    say "lr: $1 begins (${begin[0]}), $(left) s left"
    bounded $(($(left) - STOP_SECONDS)) "$PYTHON" search/lr_study.py "${begin[@]}" --data-dir "$WORK/cache" \
        --wandb off >"$WORK/$1.lr.out" 2>&1 || code=$?
    sed "s/^/$1: /" "$WORK/$1.lr.out" >>"$OUT/log.txt"
    say "lr: $1 ended with $code after $((SECONDS - began)) s:" \
        "$(grep -hE '^best lr|warning' "$WORK/$1.lr.out" | tr '\n' ' ')"
    keep
}

tables() { # of the studies that are finished
    local study done=()
    for study in "$WORK"/rows/*/; do if is_done "$study"; then done+=("$study"); fi; done
    if [ ${#done[@]} -gt 0 ]; then "$PYTHON" -m tunefleet.analysis.results "${done[@]}"; fi
    if compgen -G "$WORK/lr/*/lr_curve.csv" >/dev/null; then tail -n +1 "$WORK"/lr/*/lr_curve.csv; fi
}

studies() { # part, space…: some at once, the others as lanes get free
    local part=$1
    shift
    printf '%s\n' "$@" | xargs -P "$LANES" -I{} bash benchmarks/gpu.sh --one "$part" {}
    tables >"$OUT/tables.txt" 2>&1
    cat "$OUT/tables.txt"
    local space
    for space in "$@"; do is_done "$WORK/$part/$space" || return 1; done
}

measured() { # part, command…: what it prints is PART.txt, which ends with "complete" where all went well
    local part=$1 code=0
    shift
    if tail -n 1 "$OUT/$part.txt" 2>/dev/null | grep -qx "complete $(commit)"; then
        say "$part: is there"
        return
    fi
    : >"$OUT/$part.txt"
    bounded "$(left)" "$@" > >(tee -a "$OUT/$part.txt") 2>&1 || code=$?
    sleep 0.2 # for tee
    if [ $code = 0 ]; then echo "complete $(commit)" >>"$OUT/$part.txt"; fi
    return $code
}

commit() { # of this code
    git describe --always --dirty --abbrev=12 2>/dev/null || echo "${TUNEFLEET_COMMIT:-unknown}"
}

run_part() { # name
    local shared=(--data "$DATA" --data-dir "$WORK/cache" --device "$DEVICE" --weights "$WEIGHTS")
    if [ -n "$SMALL" ]; then shared+=(--spaces softmax resnet_softmax); fi
    export GPU_TESTS_DEVICE=$DEVICE
    case $1 in
        tests) measured tests "$PYTHON" -m pytest tests/gpu -q -s --durations=15 -p no:cacheprovider ;;
        kill)
            measured kill env GPU_TESTS_DATA="$DATA" GPU_TESTS_DATA_DIR="$WORK/cache" "$PYTHON" \
                -m pytest tests/gpu/test_studies.py -k killed -q -s -p no:cacheprovider ;;
        epoch) measured epoch "$PYTHON" -m tunefleet.benchmarks.gpu decode epoch decode-folder "${shared[@]}" ;;
        share) measured share "$PYTHON" -m tunefleet.benchmarks.gpu share "${shared[@]}" ;;
        rows) studies rows ${ROWS:-$ORDER} ;;
        lr) studies lr ${ROWS:-$LR_ORDER} ;;
    esac
}

if [ "${1:-}" = --one ]; then "${@:2}"; exit; fi
for part in "$@"; do
    if [ -z "${BOUNDS[$part]:-}" ]; then echo "error: no part $part; give of: ${!BOUNDS[*]}" >&2; exit 2; fi
done
if [ $# = 0 ]; then sed -n '2,8p' "$0"; exit 2; fi
mkdir -p "$OUT" "$WORK"/{rows,lr,cache}
if [ -d "$RESULTS" ]; then cp -n "$RESULTS"/*.txt "$RESULTS"/studies.tar.xz "$OUT" 2>/dev/null; fi
if [ -f "$OUT/studies.tar.xz" ]; then
    "$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
        "$OUT/studies.tar.xz" "$WORK"
fi
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo "no GPU")
say "$* at commit $(commit), $gpu, $(nproc) CPUs"
failed=0
for part in "$@"; do
    export DEADLINE=$(($(date +%s) + ${BOUND:-${BOUNDS[$part]}})) began=$SECONDS
    if run_part "$part"; then well="all well"; else well="not all is well" failed=1; fi
    say "$part: $well after $((SECONDS - began)) s"
done
exit $failed
