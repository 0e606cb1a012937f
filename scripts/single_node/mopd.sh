#!/usr/bin/env bash
# Distil several teachers into one student.
#
#   bash scripts/single_node/mopd.sh
#   CONFIG=config/tiny.py:mopd NUM_PROCESSES=2 bash scripts/single_node/mopd.sh --config.num_epochs=20
#
# CONFIG is a configuration file and a name in it; everything after the command goes to scripts/train_opd.py
# (--config.key=value, --dry_run, --allow_config_change). NUM_PROCESSES and PYTHON: see ../launch.sh.
exec bash "$(dirname "$0")/../launch.sh" scripts/train_opd.py --config "${CONFIG:-config/opd.py:mopd}" "$@"
