#!/usr/bin/env bash
# Train one teacher from rewards.
#
#   CONFIG=config/teacher.py:nft_geneval bash scripts/single_node/teacher.sh
#   CONFIG=config/teacher.py:tiny_scene NUM_PROCESSES=2 bash scripts/single_node/teacher.sh --config.num_epochs=20
#
# CONFIG is a configuration file and a name in it; everything after the command goes to scripts/train_teacher.py
# (--config.key=value, --dry_run, --allow_config_change). NUM_PROCESSES and PYTHON: see launch.sh.
set -euo pipefail
: "${CONFIG:?names what to train, such as CONFIG=config/teacher.py:tiny_scene}"
exec bash "$(dirname "$0")/launch.sh" scripts/train_teacher.py --config "$CONFIG" "$@"
