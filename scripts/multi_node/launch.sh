#!/usr/bin/env bash
# Start this machine's share of a run on several machines. Called by the launchers beside it, once on every machine:
#
#   launch.sh LAUNCHER [arguments]        LAUNCHER is one of ../single_node, such as mopd.sh
#
# NNODES         machines
# NODE_RANK      number of this machine, from 0
# MASTER_ADDR    address of machine 0 that the others reach
# MASTER_PORT    free port on machine 0 (default 29500), the same on every machine
# GPUS_PER_NODE  processes a machine, the same on every machine (default 8, or the GPUs present if fewer; 1 on a CPU)
#
# The run folder, prompt files and models must be the same on every machine; docs/scaling.md says what is shared.
set -euo pipefail
: "${NNODES:?is the number of machines}"
: "${NODE_RANK:?is the number of this machine, from 0}"
: "${MASTER_ADDR:?is the address of machine 0}"
export NNODES NODE_RANK MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500} MULTI_NODE=true
for name in NNODES NODE_RANK MASTER_PORT; do
    if ! [[ ${!name} =~ ^[0-9]+$ ]]; then
        echo "$name=${!name} is not a whole number." >&2
        exit 2
    fi
done
if [ "$NODE_RANK" -ge "$NNODES" ]; then
    echo "NODE_RANK=$NODE_RANK, but $NNODES machines are numbered from 0 to $((NNODES - 1))." >&2
    exit 2
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/../single_node/$1" "${@:2}"
