#!/usr/bin/env bash
# Environments of their own, for engines and trackers whose packages do not go with those of constraints.txt.
#
#   bash scripts/environments/environment.sh make paddle venv/paddle    a virtual environment with all of it
#   bash scripts/environments/environment.sh resolve [NAME ...]         whether the packages of each can be had together,
#                                                                       and those of the extras, on each Python
#
# An environment is a file of requirements that names its Python, and the packages whose versions it does not take from
# constraints.txt. Resolving installs nothing. Needs uv (extra dev, or `pip install uv`).
set -euo pipefail
cd "$(dirname "$0")/../.."
here=scripts/environments
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
echo "setuptools<81" >"$scratch/build.txt" # the last that has pkg_resources, with which mmcv is built

# said KEY FILE: what a file says behind "# KEY:".
said() { sed -n "s/^# $1: *//p" "$2"; }

# constraints FILE: constraints.txt without what the file sets free; prints where it is.
constraints() {
    local free
    free=$(said unconstrained "$1" | tr ' ' '|')
    grep -viE "^(${free:-nothing})==" constraints.txt >"$scratch/constraints.txt"
    echo "$scratch/constraints.txt"
}

resolve() {
    local name file failed=0 version
    for name in "$@"; do
        file=$here/$name.txt
        echo "environment $name on Python $(said python "$file")"
        uv pip compile --quiet --python-version "$(said python "$file")" -c "$(constraints "$file")" \
            -b "$scratch/build.txt" -o "$scratch/resolved.txt" "$file" || failed=1
    done
    for version in 3.11 3.12 3.13; do
        echo "extras on Python $version"
        uv pip compile --quiet --python-version "$version" -c constraints.txt -o "$scratch/resolved.txt" \
            --extra compbench --extra dev --extra geneval --extra hpsv2 --extra ocr --extra tiny \
            --extra tensorboard --extra wandb setup.py || failed=1
    done
    return $failed
}

make() {
    local file=$here/$1.txt
    uv venv --python "$(said python "$file")" "$2"
    uv pip install --python "$2/bin/python" -c "$(constraints "$file")" -b "$scratch/build.txt" -r "$file"
}

command -v uv >/dev/null || { echo "uv is not installed: pip install uv" >&2; exit 1; }
action=${1:-resolve}
shift || true
case $action in
    make) make "${1:?which environment}" "${2:?the folder it goes to}" ;;
    resolve)
        [ $# -gt 0 ] || for file in "$here"/*.txt; do set -- "$@" "$(basename "$file" .txt)"; done
        resolve "$@"
        ;;
    *) echo "make or resolve, not $action" >&2; exit 1 ;;
esac
