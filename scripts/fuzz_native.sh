#!/usr/bin/env bash
# The native entry points under libFuzzer, AddressSanitizer and UBSan: scripts/fuzz_native.sh [SECONDS]
# Needs clang and its runtime (Debian: clang libclang-rt-dev). The corpus stays in build/fuzz/corpus.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-600}
cmake -S native -B build/fuzz -DCMAKE_CXX_COMPILER="${CXX:-clang++}" -DCMAKE_BUILD_TYPE=Release \
  -DDROPBYDROP_FUZZ=ON -DDROPBYDROP_SANITIZE=address,undefined >/dev/null
cmake --build build/fuzz --target fuzz -j "$(nproc)" >/dev/null
mkdir -p build/fuzz/corpus
build/fuzz/fuzz -max_len=4096 -timeout=60 -print_final_stats=1 -max_total_time="$seconds" \
  -artifact_prefix=build/fuzz/ build/fuzz/corpus
