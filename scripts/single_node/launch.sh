#!/usr/bin/env bash
# Start one of the Python scripts on this machine, one process a GPU. Called by the launchers beside it.
#
#   launch.sh SCRIPT [arguments of the script]
#
# NUM_PROCESSES  processes (default 8, or the GPUs present if fewer; 1 on a CPU, where 2 or more talk through gloo)
# PYTHON         interpreter (default python)
# ENGINE         how several processes hold the base model: whole in each (default), or sharded over them by fsdp2 or
#                deepspeed_zero3 (scripts/accelerate/<ENGINE>.yaml), for a model that one GPU cannot hold
# ACCELERATE_USE_CPU=true  leaves GPUs alone
#
# The process that runs this becomes the script, or a launcher that passes signals on to the script's processes:
# SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 lets a training finish its round, save and end with status 0; a second one ends it
# at once. ../multi_node starts a share of a run on several machines from here, and names that by MULTI_NODE=true.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# transformers warns at every start that it works without torchvision, which is meant here.
export TRANSFORMERS_VERBOSITY=${TRANSFORMERS_VERBOSITY:-error}

wanted=${NUM_PROCESSES:-} variable=NUM_PROCESSES machines=1
if [ "${MULTI_NODE:-false}" = true ]; then
    wanted=${GPUS_PER_NODE:-} variable=GPUS_PER_NODE machines=$NNODES
fi

gpus=0
if [ "${ACCELERATE_USE_CPU:-false}" != true ]; then
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
fi

if [ "$gpus" -eq 0 ]; then
    here=${wanted:-1}
    config=cpu
    export ACCELERATE_USE_CPU=true
    # Several threads in each process are slower than one: the matrix products of a step are small.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
else
    here=${wanted:-$((gpus < 8 ? gpus : 8))}
    config=multi_gpu
    if [ $((here * machines)) -eq 1 ]; then config=single_gpu; fi
    if [ "$here" -gt "$gpus" ]; then
        echo "$variable=$here, but this machine shows $gpus GPU(s): set $variable to $gpus or fewer." >&2
        exit 2
    fi
fi
processes=$((here * machines))

engine=${ENGINE:-}
if [ -n "$engine" ]; then
    case $engine in
        fsdp2 | deepspeed_zero3) ;;
        *)
            echo "ENGINE=$engine: it is fsdp2 or deepspeed_zero3; left empty, every process holds the whole model." >&2
            exit 2
            ;;
    esac
    if [ "$processes" -eq 1 ]; then
        echo "ENGINE=$engine shards the base over several processes: set NUM_PROCESSES to 2 or more." >&2
        exit 2
    fi
    config=$engine
    if [ "$gpus" -eq 0 ]; then export DS_ACCELERATOR=cpu; fi # DeepSpeed does not look at ACCELERATE_USE_CPU
fi

if [ "$1" != scripts/evaluate.py ]; then
    # A mistake is said once and at once here, instead of by each process.
    "$PYTHON" -m diffusionopd.config_schema --num_processes "$processes" "${@:2}"
fi

options=(--quiet --config_file "scripts/accelerate/$config.yaml" --num_processes "$processes")
if [ "$processes" -gt 1 ] && [ -z "$engine" ]; then options+=(--multi_gpu); fi
if [ "$machines" -gt 1 ]; then
    options+=(--num_machines "$machines" --machine_rank "$NODE_RANK")
    options+=(--main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
elif [ "$processes" -gt 1 ]; then
    options+=(--main_process_port 0) # any free port, so that two runs on one machine do not collide
fi
exec "$PYTHON" -m diffusionopd.launch "${options[@]}" "$@"
