#!/usr/bin/env bash
# Start one of the Python scripts, one process per GPU. Called by the launchers in single_node/ and multi_node/.
#
#   launch.sh SCRIPT [arguments of the script]
#
# SCRIPT is a path in this repository; relative paths among the arguments are the caller's own.
#
# NUM_PROCESSES  processes (default 8, or the GPUs present if fewer; 1 on a CPU, where 2 or more talk through gloo)
# PYTHON         interpreter (default python)
# ENGINE         how several processes hold the base model: complete in each (default), or sharded over them by fsdp2 or
#                deepspeed_zero3 (scripts/accelerate/<ENGINE>.yaml), for a model that one GPU cannot hold
# ACCELERATE_USE_CPU=true  leaves GPUs alone
#
# The launchers in multi_node/ set MULTI_NODE=true and are called once on every machine, with
# NNODES         machines
# NODE_RANK      number of this machine, from 0
# MASTER_ADDR    address of machine 0 that the others reach
# MASTER_PORT    free port on machine 0 (default 29500), the same on every machine
# GPUS_PER_NODE  processes per machine, the same on every machine, in place of NUM_PROCESSES
# The run folder, prompt files and models must be the same on every machine; docs/scaling.md says what is shared.
#
# SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 lets a training finish its round, save and end with status 75: there is more to
# do. A second one ends it at once.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "$1" >&2
    exit 2
}

whole() { # VARIABLE VALUE
    [[ $2 =~ ^[1-9][0-9]{0,5}$ ]] || fail "$1=$2 is no whole number of at least 1: set $1 to one, such as $1=2."
}

PYTHON=${PYTHON:-python}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# transformers warns at every start that it works without torchvision, which is meant here.
export TRANSFORMERS_VERBOSITY=${TRANSFORMERS_VERBOSITY:-error}

machines=1 wanted=${NUM_PROCESSES:-} variable=NUM_PROCESSES
options=(--main_process_port 0) # any free port, so that two runs on one machine do not collide
if [ "${MULTI_NODE:-false}" = true ]; then
    machines=${NNODES:?is the number of machines} wanted=${GPUS_PER_NODE:-} variable=GPUS_PER_NODE
    port=${MASTER_PORT:-29500}
    whole NNODES "$machines"
    [[ "${NODE_RANK:?is the number of this machine, from 0} $port" =~ ^(0|[1-9][0-9]*)\ [1-9][0-9]*$ ]] ||
        fail "NODE_RANK=$NODE_RANK and MASTER_PORT=$port are not both whole numbers."
    [ "$NODE_RANK" -lt "$machines" ] ||
        fail "NODE_RANK=$NODE_RANK, but $machines machines are numbered from 0 to $((machines - 1))."
    options=(--num_machines "$machines" --machine_rank "$NODE_RANK" --main_process_port "$port")
    options+=(--main_process_ip "${MASTER_ADDR:?is the address of machine 0}")
fi

if [ -n "$wanted" ]; then whole "$variable" "$wanted"; fi

# -P: no file of the caller's folder is taken for a module.
gpus=0
if [ "${ACCELERATE_USE_CPU:-false}" != true ]; then
    gpus=$("$PYTHON" -P -c 'import torch; print(torch.cuda.device_count())')
fi
if [ "$gpus" -eq 0 ]; then
    here=${wanted:-1} config=cpu
    # DeepSpeed does not look at ACCELERATE_USE_CPU. Several threads in each process are slower than one: the matrix
    # products of a step are small.
    export ACCELERATE_USE_CPU=true DS_ACCELERATOR=cpu OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
else
    here=${wanted:-$((gpus < 8 ? gpus : 8))} config=multi_gpu
    [ "$here" -le "$gpus" ] ||
        fail "$variable=$here, but this machine shows $gpus GPU(s): set $variable to $gpus or fewer."
    if [ $((here * machines)) -eq 1 ]; then config=single_gpu; fi
fi
processes=$((here * machines))

case ${ENGINE:-} in
    "") if [ "$processes" -gt 1 ]; then options+=(--multi_gpu); fi ;;
    fsdp2 | deepspeed_zero3)
        config=$ENGINE
        [ "$processes" -gt 1 ] ||
            fail "ENGINE=$ENGINE shards the base over several processes: set NUM_PROCESSES to 2 or more."
        ;;
    *) fail "ENGINE=$ENGINE: it is fsdp2 or deepspeed_zero3; left empty, every process holds the complete model." ;;
esac

exec "$PYTHON" -P -m diffusionopd.launch --quiet --config_file "$root/scripts/accelerate/$config.yaml" \
    --num_processes "$processes" "${options[@]}" "$root/$1" "${@:2}"
