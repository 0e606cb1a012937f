#!/usr/bin/env bash
# Install the dev extra, then check style, types and behaviour.
#
#   bash scripts/test.sh                        the short suite
#   bash scripts/test.sh --all                  the slow tests too, and whether all environments can be resolved
#   bash scripts/test.sh tests/test_config.py   other arguments go to pytest
#
# TEST_PROCESSES  how many processes run the tests (default 2; each uses one thread)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh dev

arguments=() all=
for argument in "$@"; do
    if [ "$argument" = --all ]; then
        all=1 arguments=(-m "slow or not slow" ${arguments[@]+"${arguments[@]}"})
    else
        arguments+=("$argument")
    fi
done

ruff check .
ruff format --check .
mypy
[ -z "$all" ] || bash scripts/environments/environment.sh resolve
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} python -m pytest -n "${TEST_PROCESSES:-2}" ${arguments[@]+"${arguments[@]}"}
