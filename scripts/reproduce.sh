#!/usr/bin/env bash
# The published result in one command: download, check, distil, evaluate on four benchmarks, and the table beside the
# published one.
#
#   bash scripts/reproduce.sh --dry_run        what it will need: downloads, disk, memory, hours; loads nothing
#   bash scripts/reproduce.sh                  do it; the same command goes on where it was stopped
#   bash scripts/reproduce.sh --config.seed=7  arguments beginning with --config. go to the training
#
# Writes logs/reproduce/: run/ (the training), evaluation/, comparison.html. Stable Diffusion 3.5 asks for its licence to
# be accepted on the hub, then for `hf auth login` or HF_TOKEN.
#
# ROUNDS         rounds to train (default 3000, a guess: the published 11.26 hours on 8 GPUs at 13 s a round, which the
#                release's schedule takes here; about 2.5 hours on 8 H100, computed); another number needs another FOLDER
# NUM_PROCESSES  one per GPU (default: all, at most 8)
# CONFIG         what is trained (default config/opd.py:mopd)
# DATASETS       what is evaluated (default "geneval ocr pickscore drawbench")
# TEACHERS       whose scores are in the table too (default "pickscore ocr geneval")
# LIMIT          prompts of each benchmark (default all): for a trial
# EVAL_ARGS      further arguments of the evaluation. UnifiedReward, one of its scores, needs a running server
#                (docs/rewards.md): "--reward_options unifiedreward.base_url=http://...", or "--without unifiedreward";
#                the scorers' packages: pip install -e '.[geneval,hpsv2,ocr]' -c constraints.txt
# DOWNLOAD=false when everything is there already
# FOLDER         where it is written (default logs/reproduce, in the current folder)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

ROUNDS=${ROUNDS:-3000} CONFIG=${CONFIG:-config/opd.py:mopd} FOLDER=${FOLDER:-logs/reproduce} DOWNLOAD=${DOWNLOAD:-true}
read -ra datasets <<<"${DATASETS:-geneval ocr pickscore drawbench}"
read -ra teachers <<<"${TEACHERS:-pickscore ocr geneval}"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
dry=false overrides=("--config.num_epochs=$ROUNDS" "--config.save_dir=$FOLDER/run" --config.resume_from=auto)
for argument in "$@"; do
    case $argument in
        --dry_run) dry=true ;;
        --config.*=*) overrides+=("$argument") ;;
        *)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" >&2
            [ "$argument" = --help ] && exit 0
            echo "reproduce.sh: unknown argument $argument" >&2
            exit 2
            ;;
    esac
done

# Everything once, by the tool's own account.
downloads() {
    python "$here/tools/download.py" datasets "${datasets[@]}" "$@"
    python "$here/tools/download.py" rewards "$@"
    python "$here/tools/download.py" models sd3.5-medium loras "$@"
}

if $dry; then
    if $DOWNLOAD; then
        echo "== Downloads (about 30 GB together)"
        downloads --dry_run
    fi
    echo "== Scorers: pip install -e '.[geneval,hpsv2,ocr]' -c constraints.txt, and a server of UnifiedReward, or" \
        "EVAL_ARGS='--without unifiedreward' (docs/rewards.md)"
    echo "== Costs of $ROUNDS rounds"
    python "$here/tools/cost.py" --config "$CONFIG" --num_processes "${NUM_PROCESSES:-8}" "${overrides[@]}"
    echo "disk: besides the downloads, 1.7 MB of cached text embeddings for each prompt that the rounds draw (half" \
        "precision), and $(du -sh "$FOLDER" 2>/dev/null | cut -f1 || echo 0) that $FOLDER has now"
    echo "dry run: nothing was loaded or started"
    exit 0
fi

if $DOWNLOAD; then
    echo "== Downloading what is not here yet"
    downloads
fi
echo "== Checking"
bash "$here/scripts/single_node/mopd.sh" --dry_run "${overrides[@]}"
read -ra named <<<"${EVAL_ARGS:-}"
if [ -n "${LIMIT:-}" ]; then named+=(--limit "$LIMIT"); fi
# Prompts, scorers and their servers, before the hours; whichever the base is, so the smallest
bash "$here/scripts/single_node/eval.sh" --config "$CONFIG" --base --model "$here/assets/tiny/model" ${named[@]+"${named[@]}"} \
    --resolution 64 --dataset "${datasets[@]}" --output_dir "$FOLDER/check" --dry_run
echo "== Distilling"
bash "$here/scripts/single_node/mopd.sh" "${overrides[@]}" # ends with 75 when it is stopped: the same command goes on
echo "== Evaluating"
for teacher in "${teachers[@]}"; do named+=(--teacher "$teacher"); done
bash "$here/scripts/single_node/eval.sh" --config "$FOLDER/run/config.json" --base ${named[@]+"${named[@]}"} --checkpoint_path "$FOLDER/run" \
    --dataset "${datasets[@]}" --output_dir "$FOLDER/evaluation" --save_images --resume
python "$here/tools/compare.py" "$FOLDER"/evaluation/* --published --output "$FOLDER" --title "The published result, reproduced"
