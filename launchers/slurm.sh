#!/usr/bin/env bash
# Submit a stage to Slurm from the environment that `make install` made: launchers/slurm.sh pretrain experiment=demo launch.nodes=2
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/local.sh" submit "$@" launch=slurm
