#!/usr/bin/env bash
# From nothing to a distilled student and a page about it, on two CPU cores, in the embedded tiny world.
#
#   bash scripts/quickstart.sh                     install, distil three teachers into one student, score, draw the page
#   bash scripts/quickstart.sh --short             the same in a few rounds and on a few prompts, in logs/quickstart-short
#   bash scripts/quickstart.sh --config.seed=7     arguments beginning with --config. go to the training
#   CONFIG=config/tiny.py:mopd bash scripts/quickstart.sh    the student starts fresh, as in the paper: half a minute more
#
# Writes logs/quickstart/: report.html, summary.json, run/ (the training), evaluation/ (images and scores).
# The same command continues where it was stopped, and only draws the page again when all is done. With other arguments,
# other code or --fresh it starts anew; what was there before moves to logs/quickstart.1, .2, ...
#
# NUM_PROCESSES             processes to distil and evaluate with (default 2)
# ACCELERATE_USE_CPU=false  use GPUs, one per process
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

main() {
    local short=false fresh=false folder=logs/quickstart overrides=() limit=()
    local scale=0.6 # the sum of the teachers that the student starts from, in config/tiny.py:mopd_merged
    while [ $# -gt 0 ]; do
        case $1 in
            --short) short=true ;;
            --fresh) fresh=true ;;
            --config.*=*) overrides+=("$1") ;;
            *)
                sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" >&2
                if [ "$1" = --help ] || [ "$1" = -h ]; then return 0; fi
                echo "quickstart.sh: unknown argument $1" >&2
                return 2
                ;;
        esac
        shift
    done
    if $short; then
        folder=logs/quickstart-short
        limit=(--limit 24)
        overrides=(--config.num_epochs=4 --config.monitor_freq=1 ${overrides[@]+"${overrides[@]}"})
    fi

    source scripts/install.sh tiny
    export NUM_PROCESSES=${NUM_PROCESSES:-2} ACCELERATE_USE_CPU=${ACCELERATE_USE_CPU:-true}
    export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=${TRANSFORMERS_VERBOSITY:-error}
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

    prepare "$folder" "$fresh" ${overrides[@]+"${overrides[@]}"}
    distil "$folder" ${overrides[@]+"${overrides[@]}"}
    echo "== Scoring the base, each teacher on its task, the plain sum of the teachers and the student"
    bash scripts/single_node/eval.sh --config "$folder/run/config.json" --base --teacher compose --teacher ocr \
        --teacher scene --own_task --merge sum --merge_scale "$scale" --checkpoint_path "$folder/run" \
        --dataset compose ocr scene --batch_size 32 \
        --output_dir "$folder/evaluation" --save_images --resume ${limit[@]+"${limit[@]}"}
    python -m tools.quickstart_report --run "$folder/run" --eval "$folder/evaluation" --output "$folder" \
        --seconds "$(cat "$folder/seconds")"
}

# Keep what is there if it was made by the same code with the same arguments; otherwise move it out of the way.
prepare() {
    local folder=$1 fresh=$2 made_of number=1
    shift 2
    made_of="$* ${CONFIG:-} $NUM_PROCESSES $(find assets/tiny config diffusionopd -type f ! -name '*.pyc' -exec cksum {} + | sort | cksum)"
    if [ -e "$folder" ] && { $fresh || [ "$made_of" != "$(cat "$folder/made_of" 2>/dev/null)" ]; }; then
        while [ -e "$folder.$number" ]; do number=$((number + 1)); done
        mv "$folder" "$folder.$number"
        echo "The earlier $folder is now $folder.$number"
    fi
    mkdir -p "$folder"
    echo "$made_of" >"$folder/made_of"
}

distil() {
    local folder=$1 start=$SECONDS status=0
    shift
    if [ -f "$folder/seconds" ]; then return; fi # finished before
    echo "== Distilling three teachers into one student"
    CONFIG=${CONFIG:-config/tiny.py:mopd_merged} bash scripts/single_node/mopd.sh --config.save_dir="$folder/run" \
        --config.run_name=quickstart --config.resume_from=auto "$@" || status=$?
    if [ "$status" -eq 75 ]; then echo "The distillation was stopped; the same command continues it." >&2; fi
    if [ "$status" -ne 0 ]; then return "$status"; fi
    echo $((SECONDS - start)) >"$folder/seconds"
}

main "$@"
