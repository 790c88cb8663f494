#!/usr/bin/env bash
# Puts the peers that benchmarks/training_step.py compares with into an environment of their own, .cache/peers.
# PYTHON picks the interpreter; TORCH_INDEX adds a package index, for a CPU-only torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python="${PYTHON:-python3}"
place=.cache/peers
index=()
if [ -n "${TORCH_INDEX:-}" ]; then index=(--extra-index-url "$TORCH_INDEX"); fi

"$python" -m venv --clear "$place"
pip=("$place/bin/python" -m pip -qq --disable-pip-version-check install)
# The torch that unmix is tested with, so that only the libraries differ.
grep '^torch==' constraints.txt > "$place/torch.txt"
"${pip[@]}" "${index[@]}" -r "$place/torch.txt"
"${pip[@]}" "${index[@]}" -c "$place/torch.txt" sae-lens==6.54.12 eai-sparsify==1.3.3
# Its own pins ask for an nnsight that today's transformers breaks; its TopK trainer needs nothing of it but the import.
"${pip[@]}" --no-deps dictionary-learning==0.1.0
"$place/bin/python" -m pip freeze > "$place/versions.txt"
grep -iE '^(torch|transformers|sae-lens|eai-sparsify|dictionary-learning)==' "$place/versions.txt"
