#!/usr/bin/env bash
# Submit a stage to Kubernetes from the environment that `make install` made:
# launchers/kubernetes.sh sft experiment=demo launch.image=registry.example/llmscale:0.1.0
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/local.sh" submit "$@" launch=kubernetes
