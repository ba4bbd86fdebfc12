#!/usr/bin/env bash
# What a user of the wheel sees: in an empty folder, with an empty cache, the bundled recipe on the bundled model (with little text),
# its artifact verified and run, and the C sources that came along compiled. `make wheel-check` calls it with the installed command.
set -euo pipefail
quantflow="$(realpath -s "$1")"

place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
cd "$place"
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV QUANTFLOW_STORE
export XDG_CACHE_HOME="$place/cache" HF_HUB_OFFLINE=1

{
    "$quantflow" --version
    "$quantflow" run demo_w4_kv8 --set calibration.samples=16 --set calibration.seqlen=256 --set stages.evaluate.windows=8
    "$quantflow" verify artifacts/demo_w4_kv8
    "$quantflow" generate artifacts/demo_w4_kv8 "The SELECT statement" --max-tokens 8
    "$quantflow" export artifacts/demo_w4_kv8/awq --format gguf --output demo_gguf --requantize
} 2> >(tee errors >&2)

if grep -q "could not be compiled" errors; then
    echo "the C kernels of the wheel were not compiled" >&2
    exit 1
fi
for source in cpu_causal cpu_kernels cpu_solver; do
    ls cache/quantflow/"$source"-*.so
done
