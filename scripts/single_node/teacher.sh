#!/usr/bin/env bash
# Train one teacher from rewards.
#
#   CONFIG=config/teacher.py:nft_geneval bash scripts/single_node/teacher.sh
#   CONFIG=config/teacher.py:tiny_scene NUM_PROCESSES=2 bash scripts/single_node/teacher.sh --config.num_epochs=20
#
# Arguments go to scripts/train_teacher.py; everything else is as in mopd.sh.
: "${CONFIG:?names what to train, such as CONFIG=config/teacher.py:tiny_scene}"
exec bash "$(dirname "$0")/../launch.sh" scripts/train_teacher.py --config "$CONFIG" "$@"
