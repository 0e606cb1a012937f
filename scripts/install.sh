# Make sure that a virtual environment is active and has this project with the given extras. To be sourced:
#
#   source scripts/install.sh [EXTRAS]        for example: source scripts/install.sh tiny,tensorboard
#
# An active environment (venv, or conda other than base) is used as it is; otherwise .venv is made in the repository
# root and activated.
# Nothing is installed when neither setup.py nor constraints.txt has changed since the last time.
# BASE_PYTHON chooses the interpreter that makes .venv (3.11 to 3.13).

_find_python() {
    local candidate
    for candidate in ${BASE_PYTHON:+"$BASE_PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.11, 3.12 or 3.13 found. Install one, or name it: BASE_PYTHON=/path/to/python3.11" >&2
    return 1
}

_install() {
    local root extras=${1:-} target stamp wanted
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 1
    if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
        if [ ! -f "$root/.venv/bin/activate" ]; then # which comes last
            local interpreter
            interpreter=$(_find_python) || return 1
            echo "Making the virtual environment .venv with $interpreter"
            "$interpreter" -m venv "$root/.venv" || return 1
        fi
        # shellcheck disable=SC1091
        source "$root/.venv/bin/activate" || return 1
    fi
    target="$root[${extras}]"
    stamp="$(python -c 'import sys; print(sys.prefix)')/.diffusionopd-installed"
    wanted="$target $(cat "$root/setup.py" "$root/constraints.txt" | cksum)"
    if ! grep -qxF "$wanted" "$stamp" 2>/dev/null; then
        echo "Installing the project${extras:+ with $extras} (the first time takes minutes)"
        python -m pip install --disable-pip-version-check --quiet -e "$target" -c "$root/constraints.txt" || return 1
        # Of another checkout, or of this one as it was, nothing is installed any more
        { grep -F "$root[" "$stamp" 2>/dev/null | grep -F "${wanted#"$target"}" || true; echo "$wanted"; } >"$stamp.new"
        mv "$stamp.new" "$stamp"
    fi
}

_install "$@"
