#!/usr/bin/env bash
# Install the dev extra, then check style, types and behaviour.
#
#   bash scripts/test.sh                        everything
#   bash scripts/test.sh tests/test_config.py   arguments go to pytest
#
# TEST_PROCESSES  how many processes run the tests (default 2; each uses one thread)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh dev

ruff check .
ruff format --check .
mypy
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest -n "${TEST_PROCESSES:-2}" "$@"
