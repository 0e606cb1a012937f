#!/usr/bin/env bash
# Generate the images of test sets with one model or several and score them.
#
#   CHECKPOINT=logs/mopd/checkpoints/checkpoint-300 DATASET=ocr bash scripts/single_node/eval.sh --save_images
#   bash scripts/single_node/eval.sh --lora_hf_path quanhaol/DiffusionOPD/Student/lora --dataset geneval --output_dir logs/eval
#   bash scripts/single_node/eval.sh --base --teacher ocr --checkpoint_path logs/mopd --dataset ocr --output_dir logs/eval
#
# CHECKPOINT and DATASET become --checkpoint_path and --dataset; everything after the command goes to
# scripts/evaluate.py. NUM_PROCESSES and PYTHON: see ../launch.sh.
exec bash "$(dirname "$0")/../launch.sh" scripts/evaluate.py \
    ${CHECKPOINT:+--checkpoint_path "$CHECKPOINT"} ${DATASET:+--dataset "$DATASET"} "$@"
