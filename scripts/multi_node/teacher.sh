#!/usr/bin/env bash
# Train one teacher from rewards, on several machines.
#
#   export CONFIG=config/teacher.py:nft_geneval
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/multi_node/teacher.sh     # and NODE_RANK=1 on the other
#
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and GPUS_PER_NODE: see ../launch.sh. The rest: see ../single_node/teacher.sh.
MULTI_NODE=true exec bash "$(dirname "$0")/../single_node/teacher.sh" "$@"
