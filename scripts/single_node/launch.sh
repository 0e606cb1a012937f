#!/usr/bin/env bash
# Start one of the Python scripts on this machine, one process a GPU. Called by the launchers beside it.
#
#   launch.sh SCRIPT [arguments of the script]
#
# NUM_PROCESSES  processes (default 8, or the GPUs present if fewer; 1 on a CPU, where 2 or more talk through gloo)
# PYTHON         interpreter (default python)
# ACCELERATE_USE_CPU=true  leaves GPUs alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# transformers warns at every start that it works without torchvision, which is meant here.
export TRANSFORMERS_VERBOSITY=${TRANSFORMERS_VERBOSITY:-error}

gpus=0
if [ "${ACCELERATE_USE_CPU:-false}" != true ]; then
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
fi

if [ "$gpus" -eq 0 ]; then
    processes=${NUM_PROCESSES:-1}
    config=cpu
    export ACCELERATE_USE_CPU=true
    # Several threads in each process are slower than one: the matrix products of a step are small.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
else
    processes=${NUM_PROCESSES:-$((gpus < 8 ? gpus : 8))}
    config=multi_gpu
    if [ "$processes" -eq 1 ]; then config=single_gpu; fi
    if [ "$processes" -gt "$gpus" ]; then
        echo "NUM_PROCESSES=$processes, but this machine shows $gpus GPU(s): set NUM_PROCESSES to $gpus or fewer." >&2
        exit 2
    fi
fi

if [ "$1" != scripts/evaluate.py ]; then
    # A mistake is said once and at once here, instead of by each process and before the launcher's own stack trace.
    "$PYTHON" -m diffusionopd.config_schema --num_processes "$processes" "${@:2}"
fi

options=(--quiet --config_file "scripts/accelerate/$config.yaml" --num_processes "$processes")
if [ "$processes" -gt 1 ]; then
    options+=(--multi_gpu --main_process_port 0) # 0: any free port, so that two runs on one machine do not collide
fi
exec "$PYTHON" -m accelerate.commands.launch "${options[@]}" "$@"
