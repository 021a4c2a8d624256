#!/usr/bin/env bash
# Make the virtual environment $1 hold opd_ray and the tested set of packages; do nothing when it does.
# PYTHON names the interpreter to use; OPD_RAY_MIN_FREE_GB (default 7) the free disk that is asked for.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${1:-.venv}
python=$venv/bin/python
stamp=$venv/.installed
log=$venv/install.log

fail() {
    echo "error: $*" >&2
    exit 1
}

supported() { # runs it: a shim on PATH may name an interpreter that is not there
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
        >/dev/null 2>&1
}

find_python() { # every place on PATH, since the first may hold such a shim
    local name dir
    for name in python3.11 python3.12 python3.13 python3 python; do
        while IFS= read -r -d : dir; do
            if [[ -x $dir/$name ]] && supported "$dir/$name"; then
                echo "$dir/$name"
                return
            fi
        done <<<"$PATH:"
    done
    return 1
}

fingerprint() { # also of the place: an environment that was moved is set up again
    cat pyproject.toml constraints.txt | "$python" -c '
import hashlib, sys
print(hashlib.sha256(sys.stdin.buffer.read() + f"{sys.version} {sys.prefix}".encode()).hexdigest())'
}

check_disk() { # what an earlier attempt has put there counts
    local needed=${OPD_RAY_MIN_FREE_GB:-7} free have=0
    free=$(df -Pk "$(dirname "$venv")" | awk 'NR == 2 { print int($4 / 1048576) }')
    [[ ! -d $venv ]] || have=$(du -sk "$venv" | awk '{ print int($1 / 1048576) }')
    ((free + have >= needed)) || fail "the installation needs $((needed - have)) GB of free disk and" \
        "$(cd "$(dirname "$venv")" && pwd) has $free GB; free some, or name another place: make VENV=/path/to/venv"
}

make_venv() {
    local base
    if [[ -e $venv && ! -e $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
        fail "$venv exists and is no virtual environment; move it away, or set VENV=/path/to/venv"
    fi
    if [[ -n ${PYTHON:-} ]]; then
        base=$PYTHON
        supported "$base" || fail "PYTHON=$base does not run as Python 3.11, 3.12 or 3.13 with venv"
    else
        base=$(find_python) || fail "no Python 3.11, 3.12 or 3.13 with venv on PATH works;" \
            "install one, or name it: make PYTHON=/path/to/python3.11"
    fi
    if [[ -e $venv ]]; then # aside first: a removal that is cut short leaves nothing half a venv
        rm -rf "$venv.broken"
        mv "$venv" "$venv.broken"
    fi
    rm -rf "$venv.broken"
    "$base" -m venv "$venv" || fail "$base could not create $venv"
}

drop_half_installed() { # pip writes RECORD last, and takes a package without one for installed
    local info
    for info in "$venv"/lib/python*/site-packages/*.dist-info; do
        [[ -e $info/RECORD || ! -d $info ]] || rm -rf "$info"
    done
}

install() {
    local shown='Downloading [^ ]+ \(([0-9]{3,}\.[0-9] MB|[0-9.]+ GB)\)|^Installing collected packages|^ERROR.*'
    # Of DeepSpeed only the Python is used: its kernels would need a compiler.
    if ! DS_BUILD_OPS=0 "$python" -m pip install --disable-pip-version-check --progress-bar off \
        -c constraints.txt -e '.[dev,deepspeed,ocr]' 2>&1 | tee "$log" | { grep --line-buffered -oE "$shown" || true; }; then
        fail "the installation stopped; the whole story is in $log, and the same command continues it"
    fi
}

if [[ -x $python ]] && "$python" -c '' 2>/dev/null; then
    if [[ -f $stamp && $(<"$stamp") == "$(fingerprint)" ]]; then
        exit 0
    fi
    supported "$python" || fail "$venv holds $("$python" -V), not 3.11, 3.12 or 3.13;" \
        "remove it, or set VENV=/path/to/venv"
    check_disk
    rm -f "$stamp"
else
    check_disk
    make_venv
fi
echo "Installing opd_ray and its packages into $venv (once, about 6 minutes and 6 GB; log: $log)"
"$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null ||
    fail "$venv has no pip and could not get it; remove $venv and try again"
drop_half_installed
install
fingerprint >"$stamp.new"
mv "$stamp.new" "$stamp"
