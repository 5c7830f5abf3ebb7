#!/usr/bin/env bash
# A day at a GPU: tests of the kernels, a memory checker, tuning, the benchmarks and their report, in the minutes given.
#
#   bench/gpu_day.sh [--dry] [--out DIR] [--revision REV] [minutes]
#
# minutes      25 unless told otherwise; what they are too short for is cut short or left out, and said so
# --out        an empty or new folder for the results (default: runs/gpu-DATE); it has what there is by now at any time
# --revision   of the sources, where git cannot tell
# --dry        without a GPU: a few small cases, kernels launched into nothing
#
# Works from a checkout that is not installed, without a network. Exit status: 0 if all is well, though tuning or the
# benchmarks may have been cut short; 1 if not; 2 for bad usage, or no GPU; 130 if interrupted, with what there was.

set -u

# Each step's share, in percent. A step has its share of the time that is left, so what one spares is for the next ones.
STEPS=(facts tests memcheck racecheck tune optim suite report)
declare -A SHARE=([facts]=4 [tests]=25 [memcheck]=5 [racecheck]=4 [tune]=8 [optim]=12 [suite]=39 [report]=3)
LEAST=5    # seconds: with less, a step is not begun
GRACE=20   # seconds that a step has to end once it is told to

usage() {
    echo "gpu_day.sh: $1 (usage: gpu_day.sh [--dry] [--out DIR] [--revision REV] [minutes])" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry='' out='' revision='' minutes=''
while [ $# -gt 0 ]; do
    case $1 in
        --dry) dry=1 ;;
        --out | --revision)
            [ $# -gt 1 ] || usage "$1 needs a value"
            if [ "$1" = --out ]; then out=$2; else revision=$2; fi
            shift
            ;;
        *)
            [[ $1 =~ ^[0-9]{1,4}(\.[0-9]+)?$ ]] || usage "unknown argument '$1'"
            [ -z "$minutes" ] || usage "minutes are given twice"
            minutes=$1
            ;;
    esac
    shift
done
deadline=$(awk -v minutes="${minutes:-25}" 'BEGIN { print int(60 * minutes) }')
out=${out:-$root/runs/gpu-$(date +%Y%m%d-%H%M%S)}
[ -z "$(ls -A "$out" 2>/dev/null)" ] || usage "--out: $out is not empty"
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
revision=${revision:-$(git -C "$root" describe --always --dirty 2>/dev/null || echo unknown)}

# Nothing is left behind but the results: caches, and the package as an installation would lay it out, are scratch.
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch/lib/tritonshare/plans" "$scratch/tmp"
for entry in "$root"/tritonshare/*; do
    case ${entry##*/} in plans | __pycache__) ;; *) ln -s "$entry" "$scratch/lib/tritonshare/" ;; esac
done
ln -s "$root/kernels" "$scratch/lib/tritonshare/kernels"
cp "$root"/tritonshare/plans/*.json "$scratch/lib/tritonshare/plans/" 2>/dev/null

unset TRITON_INTERPRET PYTHONHOME "${!PYTEST_@}"
export PYTHONPATH=$scratch/lib:$root${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export TMPDIR=$scratch/tmp XDG_CACHE_HOME=$scratch/cache # where a table of the user's own would be
export TRITON_CACHE_DIR=$scratch/triton TORCHINDUCTOR_CACHE_DIR=$scratch/inductor
cd "$root" || exit 2

python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
python=$("$python" -c 'import sys; print(sys.executable)') || exit 2

# The arch, then each op with the layer that takes the fewest operations.
found=$("$python" - "$dry" 2>"$scratch/error" <<'PYTHON'
import sys

import torch

from bench.launches import work
from tritonshare import plan
from tritonshare.op import REGISTRY

dry = bool(sys.argv[1])
if not dry and not torch.cuda.is_available():
    raise SystemExit("no GPU: torch finds none (--dry runs all but the kernels without one)")
print(plan.facts(torch.device("cpu" if dry else "cuda")).arch)
for op in REGISTRY.values():
    layers = [case for case in op.cases if "layer" in case.tags]
    if layers:
        print(op.name, min(layers, key=lambda case: work(op, case)).name)
PYTHON
) || { echo "gpu_day.sh: $(tail -n 1 "$scratch/error")" >&2; exit 2; }
mapfile -t found <<<"$found"
arch=${found[0]} layers=("${found[@]:1}")
plans=$out/plans-$arch.json

# Steps.

interrupted='' running=''
trap 'interrupted=1; [ -z "$running" ] || kill -INT "$running" 2>/dev/null' INT TERM HUP

# A shell makes what runs in its background deaf to interrupts, and pytest writes its results when it hears one.
heed=()
if env --default-signal=INT true 2>/dev/null; then heed=(env --default-signal=INT); fi

# try COMMAND...: run it in what the step has left of its time, and keep the worst outcome of the step's commands.
try() {
    local left=$((step_deadline - SECONDS)) code
    if [ -n "$interrupted" ] || [ "$left" -le 0 ]; then
        [ "$outcome" != ok ] || outcome='out of time'
        return
    fi
    printf '$ %s\n' "$*" >>"$log"
    timeout --signal=INT --kill-after="$GRACE" "$left" "${heed[@]}" "$@" </dev/null >>"$log" 2>&1 &
    running=$!
    [ -z "$interrupted" ] || kill -INT "$running" # told before there was anything to tell it to
    until wait "$running"; code=$?; ! kill -0 "$running" 2>/dev/null; do :; done
    running=''
    if [ "$code" -eq 0 ]; then
        return
    elif [ "$SECONDS" -ge "$step_deadline" ]; then
        [ "$outcome" != ok ] || outcome='out of time'
    else
        outcome="failed ($code)"
    fi
}

# step NAME OUTPUT: run the function of that name. What it writes is in OUTPUT; its log is NAME.log.
step() {
    local name=$1 output=$2 begin=$SECONDS share=0 other reached=''
    for other in "${STEPS[@]}"; do
        [ "$other" = "$name" ] && reached=1
        [ -n "$reached" ] && share=$((share + SHARE[$other]))
    done
    step_deadline=$((SECONDS + (deadline - SECONDS) * SHARE[$name] / share))
    log=$out/$name.log
    outcome=ok
    if [ -n "$interrupted" ] || [ $((step_deadline - SECONDS)) -lt "$LEAST" ]; then
        outcome='left out'
        output=
    else
        "$name"
        [ -z "$interrupted" ] || outcome=interrupted
    fi
    tell "$name" "$outcome" "$((SECONDS - begin))" "$output"
    case $name in
        tune | optim | suite) [[ $outcome =~ ^(ok|out of time|left out)$ ]] ;;
        *) [ "$outcome" = ok ] ;;
    esac || failed=1
}

tell() {
    printf '%-10s %-12s %8s  %s\n' "$@" >>"$out/summary.txt"
}

facts() {
    if command -v nvidia-smi >/dev/null; then try nvidia-smi -q; fi
    try "$python" -c '
import importlib.metadata, sys, tritonshare
for found in sorted(importlib.metadata.distributions(), key=lambda found: found.name.lower()):
    print(found.name, found.version)
print("python", sys.version)
print("tritonshare", tritonshare.__file__)'
    try "$python" -c 'import sys; from tritonshare.cli import main; sys.exit(main(["doctor", "--no-check"]))'
}

lane=(--lane gpu)
[ -z "$dry" ] || lane=(--lane dry -m 'not long')

tests() {
    local workers
    workers=$(nproc)
    # each holds a context of its own on the GPU, some 500 MB; more of them would wait for each other
    try "$python" -m pytest tests/test_ops_gpu.py "${lane[@]}" -n $((workers < 8 ? workers : 8)) --dist worksteal \
        -v --durations=25 --junitxml "$out/tests.xml"
}

# sanitize TOOL OPTION...
sanitize() {
    local checker=()
    if [ -z "$dry" ]; then
        checker=(compute-sanitizer --error-exitcode 99 --target-processes application-only --tool "$@")
    fi
    # with a caching allocator's blocks around it, an access out of bounds would meet valid memory
    try env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${checker[@]}" \
        "$python" -m pytest tests/test_ops_gpu.py "${lane[@]}" -k test_sanitized -v
}

memcheck() {
    sanitize memcheck --report-api-errors no
}

racecheck() {
    sanitize racecheck
}

tune() {
    local name layer budget
    budget=$(((step_deadline - SECONDS) / ${#layers[@]}))
    cp "$scratch/lib/tritonshare/plans/$arch.json" "$plans" 2>/dev/null
    for name in "${layers[@]}"; do
        read -r name layer <<<"$name"
        if [ -n "$dry" ]; then
            try "$python" -m bench.tune "$name" --case "$layer" --dry --plans 2 --out "$plans" --revision "$revision"
            return # a dry run writes a new file only
        fi
        try "$python" -m bench.tune "$name" --budget $((budget > GRACE ? budget - GRACE : 1)) --out "$plans" \
            --revision "$revision"
    done
    cp "$plans" "$scratch/lib/tritonshare/plans/$arch.json" 2>/dev/null # which the benchmarks measure with
}

# benchmarks RESULTS OPTION...: rows, for as long as the step has time.
benchmarks() {
    local seconds=$((step_deadline - SECONDS - GRACE)) results=$1
    try "$python" -m pytest "${@:2}" --results "$out/$results" --revision "$revision" -q -rfE ${dry:+--dry} \
        --minutes "$(awk -v seconds=$((seconds > 0 ? seconds : 0)) 'BEGIN { print seconds / 60 }')"
}

optim() {
    local few=()
    [ -z "$dry" ] || few=(--op AdamW --case nature_dqn --dtype fp32 --provider ours --provider fused)
    benchmarks optim.json bench/test_optim.py "${few[@]}"
}

suite() {
    local few=() name
    if [ -n "$dry" ]; then # of images, of matrices, of numbers of rows: the others' arguments are of these kinds
        few=(--dtype bf16 --pass both --provider ours --provider eager)
        for name in "${layers[@]}"; do
            case ${name% *} in conv2d_act_pool | nearest | segment_sum) few+=(--op "${name% *}" --case "${name#* }") ;; esac
        done
    fi
    benchmarks suite.json bench/test_suite.py bench/test_host.py "${few[@]}"
}

report() {
    local results=() name
    for name in optim suite; do [ ! -e "$out/$name.json" ] || results+=("$out/$name.json"); done
    try "$python" -m bench.report "${results[@]}" -o "$out/report.html" --markdown "$out/report.md"
}

# The day.

failed=''
{
    echo "$(date -u +%Y-%m-%dT%H:%M:%SZ), revision $revision, $arch, ${minutes:-25} minutes${dry:+, a dry run: no measurement}"
    echo
} >"$out/summary.txt"
tell step status seconds output
step facts facts.log
step tests tests.xml
step memcheck memcheck.log
step racecheck racecheck.log
step tune "${plans##*/}"
step optim optim.json
step suite suite.json
step report 'report.html, report.md'

(cd "$out" && tar -czf logs.tar.gz -- *.log 2>/dev/null && rm -f -- *.log)
printf '\nlogs are in logs.tar.gz\n' >>"$out/summary.txt"
cat "$out/summary.txt"
echo "all of it is in $out"
[ -z "$interrupted" ] || exit 130
[ -z "$failed" ]
