#!/usr/bin/env bash
# Distil a single teacher: CONFIG is config/opd.py:sopd_pickscore (default), :sopd_ocr or :sopd_geneval.
# Everything else is as in mopd.sh.
CONFIG=${CONFIG:-config/opd.py:sopd_pickscore} exec bash "$(dirname "$0")/mopd.sh" "$@"
