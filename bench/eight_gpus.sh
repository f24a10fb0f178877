#!/usr/bin/env bash
# The published table on eight GPUs: bench/eight_gpus.sh FOLDER [key=value ...]; docs/eight-gpus.md says what it is.
set -euo pipefail
folder=${1:?"usage: bench/eight_gpus.sh FOLDER [key=value ...]"}
shift
weights=(model.weights=dummy)
[[ " $* " == *" model.path="* ]] && weights=()
cells=()
for latency in ${LATENCIES:-0 16 32 64 256}; do
    trace=$([ "$latency" = 64 ] && echo trace=true || true)
    cells+=(--cell "pipeline only, $latency ms: network.latency_ms=$latency pipeline.rounds=${RANKS:-8} kvcache.swap_pages=0")
    cells+=(--cell "planned, $latency ms: network.latency_ms=$latency $trace")
    [ "$latency" = 64 ] && cells+=(--cell "planned, all memory, 64 ms: network.latency_ms=64 kvcache.gpu_memory_gb=null")
done
exec "${PYTHON:-python}" -m bench.steady --ranks "${RANKS:-8}" --seconds "${CELL_S:-60}" --window "${WINDOW_S:-15}" \
    --output "$folder" "${cells[@]}" \
    model=llama-3-70b kvcache.gpu_memory_gb=4 workload.source=fixed8000:512:0 "${weights[@]}" "$@"
