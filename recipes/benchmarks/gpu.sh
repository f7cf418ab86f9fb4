#!/usr/bin/env bash
# Every check and benchmark that wants a GPU, in at most 8 minutes on one: the tests marked `gpu` (families, Trainer, 2
# to 4 NCCL ranks on one GPU), one device's step, and what a layer costs. Leaves JSON.
#
#   recipes/benchmarks/gpu.sh [--device cuda|cpu] [--output FOLDER] [--python PYTHON]
set -euo pipefail
cd "$(dirname "$0")/../.."
device=cuda output=recipes/benchmarks/results python=.venv/bin/python
while [ $# -gt 0 ]; do
    case "$1" in
        --device) device=$2 ;;
        --output) output=$2 ;;
        --python) python=$2 ;;
        *) echo "unknown option $1"; exit 2 ;;
    esac
    shift 2
done
mkdir -p "$output"
failed=0
xml=$(mktemp)
workers=$("$python" -c 'import os, xdist; print(max(1, os.cpu_count() // 2))' 2>/dev/null || echo 0)
timeout 180 "$python" -m pytest -q -m gpu $([ "$workers" = 0 ] || echo "-n $workers") --device "$device" --junitxml "$xml" tests/gpu || failed=1
"$python" - "$xml" "$output/gpu_checks.json" "$device" <<'PYTHON' || failed=1
import json, sys, xml.etree.ElementTree as tree
suite = tree.parse(sys.argv[1]).getroot()[0]
cases = {
    f"{c.get('classname')}::{c.get('name')}": {"seconds": float(c.get("time")), "failed": len(c) > 0} for c in suite
}
json.dump({"command": "gpu.sh", "device": sys.argv[3], "checks": cases}, open(sys.argv[2], "w"), indent=1)
PYTHON
timeout 130 "$python" recipes/benchmarks/one_device.py --device "$device" --output "$output/one_device.json" || failed=1
timeout 90 "$python" recipes/benchmarks/layer_costs.py --device "$device" --output "$output/layer_costs.json" || failed=1
exit $failed
