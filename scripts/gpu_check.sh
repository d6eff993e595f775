#!/bin/sh
# What to measure where an NVIDIA GPU is: conformance, the cost of planning, step times, live goodput and the simulator's
# error, with a model of Llama-3-8B's shape and random weights. About 12 minutes; results under bench-results/gpu.
#
#   TEMPO_DEVICE=cuda make setup && scripts/gpu_check.sh
set -eu
cd "$(dirname "$0")/.."
OUT=${OUT:-bench-results/gpu}
MODEL=$OUT/model
mkdir -p "$OUT"
PYTHON=.venv/bin/python

$PYTHON -m pytest tests/conformance/test_tempo_scheduler.py -q
$PYTHON -m benchmarks.schedule_time --steps 200 --rounds 3 --folder "$OUT" --json "$OUT/schedule_time.json"
$PYTHON -m benchmarks.dummy_model "$MODEL"
$PYTHON -m benchmarks.live --through fleet --model "$MODEL" \
    --engine-kwargs '{"load_format": "dummy", "gpu_memory_utilization": 0.22, "enforce_eager": true, "max_model_len": 8192}' \
    --policies fcfs,priority,class_priority,tempo --loads 1.5 --seeds 1 --seconds 40 --slots 64 --step-tokens 2048 \
    --scale 1.0 --backlog 60000 --truth --folder "$OUT/live" --json "$OUT/live.json" --report "$OUT/live-report.md"
