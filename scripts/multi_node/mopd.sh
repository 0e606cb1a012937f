#!/usr/bin/env bash
# Distil several teachers into one student, on several machines.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/multi_node/mopd.sh     # and NODE_RANK=1 on the other
#
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and GPUS_PER_NODE: see ../launch.sh. The rest: see ../single_node/mopd.sh.
MULTI_NODE=true exec bash "$(dirname "$0")/../single_node/mopd.sh" "$@"
