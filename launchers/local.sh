#!/usr/bin/env bash
# Run llmscale in the environment that `make install` made: launchers/local.sh pretrain experiment=demo
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ ! -x "$top/.venv/bin/llmscale" ]; then
    echo "llmscale is not installed in $top/.venv: run 'make install' there." >&2
    exit 2
fi
export PATH="$top/.venv/bin:$PATH" # DeepSpeed calls ninja by its bare name
exec llmscale "$@"
