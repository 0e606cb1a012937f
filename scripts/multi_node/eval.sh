#!/usr/bin/env bash
# Generate the images of a test set and score them, on several machines.
#
#   export CHECKPOINT=logs/mopd/checkpoints/checkpoint-300 DATASET=ocr
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash scripts/multi_node/eval.sh     # and NODE_RANK=1 on the other
#
# NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and GPUS_PER_NODE: see ../launch.sh. The rest: see ../single_node/eval.sh.
MULTI_NODE=true exec bash "$(dirname "$0")/../single_node/eval.sh" "$@"
