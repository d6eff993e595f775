#!/bin/sh
# Makes .venv with everything that serving and testing need, from a committed lock. Does nothing when nothing changed.
#
#   TEMPO_DEVICE=cpu|cuda   which build of vLLM; default: cuda where an NVIDIA GPU is, else cpu
#   PYTHON=...              which Python (3.11 to 3.13); default: the first suitable one on PATH
#   PIP_FIND_LINKS, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_CERT are passed on to uv, which does not read them itself.
set -eu
cd "$(dirname "$0")/.."

UV_VERSION=0.13.9
VENV=.venv
STAMP=$VENV/tempo-setup
LOG=$VENV/tempo-setup.log

fail() {
    printf 'setup: %s\n' "$1" >&2
    exit 1
}

device() {
    case "${TEMPO_DEVICE:-}" in
        cpu | cuda) echo "$TEMPO_DEVICE" ;;
        "") if [ -e /dev/nvidia0 ] || nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then echo cuda; else echo cpu; fi ;;
        *) fail "TEMPO_DEVICE=$TEMPO_DEVICE; set it to cpu or cuda, or leave it out" ;;
    esac
}

suits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

python() {
    if [ -n "${PYTHON:-}" ]; then
        suits "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13"
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.13; do
        if suits "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11, 3.12 or 3.13 on PATH (python3 is $(python3 -V 2>&1 || true)); install one, or name it with PYTHON=..."
}

# Runs a step with its output in the log; shows the log when the step fails.
quietly() {
    "$@" >>"$LOG" 2>&1 || {
        tail -n 40 "$LOG" >&2
        fail "this failed: $* (whole log: $LOG)"
    }
}

# Whether .venv can be used as it is; a setup that was interrupted may have left half of one.
has_venv() {
    suits $VENV/bin/python && { [ -x $VENV/bin/uv ] || $VENV/bin/python -c 'import pip' 2>/dev/null; }
}

make_venv() {
    mkdir -p $VENV
    has_venv && return
    rm -rf $VENV
    mkdir $VENV
    base=$(python)
    if "$base" -c 'import ensurepip, venv' 2>/dev/null; then
        quietly "$base" -m venv $VENV
    elif "$base" -c 'import venv, pip' 2>/dev/null; then
        quietly "$base" -m venv --without-pip $VENV
    else
        version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        fail "$base cannot make virtual environments; install its venv module (on Debian and Ubuntu: apt install python$version-venv)"
    fi
}

install_uv() {
    [ "$($VENV/bin/uv --version 2>/dev/null | cut -d' ' -f2)" = "$UV_VERSION" ] && return
    if $VENV/bin/python -c 'import pip' 2>/dev/null; then
        quietly $VENV/bin/python -m pip install --quiet "uv==$UV_VERSION"
    else
        quietly "$(python)" -m pip --python $VENV/bin/python install --quiet "uv==$UV_VERSION"
    fi
}

uv_settings() {
    if [ -n "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"; fi
    if [ -n "${PIP_EXTRA_INDEX_URL:-}" ]; then export UV_INDEX="${UV_INDEX:-$PIP_EXTRA_INDEX_URL}"; fi
    if [ -n "${PIP_CERT:-}" ]; then export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"; fi
    export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}"
}

install_lock() {
    set -- --requirements "requirements/$DEVICE.lock"
    if [ "$DEVICE" = cpu ]; then set -- "$@" --overrides requirements/overrides-cpu.txt; fi
    if [ -n "${PIP_FIND_LINKS:-}" ]; then
        for place in $PIP_FIND_LINKS; do set -- "$@" --find-links "$place"; done
    elif [ "$DEVICE" = cpu ]; then
        # CPU builds of torch live in an index of their own, which uv knows by this name.
        set -- "$@" --torch-backend cpu
    else
        set -- "$@" --torch-backend auto
    fi
    quietly $VENV/bin/uv pip install --python $VENV/bin/python "$@"
    # The project itself, so that `tempo` is a command; what it needs is already there.
    quietly $VENV/bin/uv pip install --python $VENV/bin/python --no-deps --editable .
}

fingerprint() {
    echo "device $DEVICE"
    cksum pyproject.toml scripts/setup.sh requirements/"$DEVICE".lock requirements/overrides-cpu.txt
    pwd
}

DEVICE=$(device)
# One setup at a time: `make serve` and `make test` may be started together.
exec 9>$VENV.lock
if command -v flock >/dev/null; then flock 9; fi
WANTED=$(fingerprint)
[ "$WANTED" = "$(cat $STAMP 2>/dev/null)" ] && exit 0

if [ -e $STAMP ] && ! grep -qx "device $DEVICE" $STAMP; then
    # The CPU and the CUDA build of vLLM are two packages with the same files: they cannot follow each other.
    rm -rf $VENV
fi
echo "Setting up $VENV for $DEVICE; the first time takes some minutes."
make_venv
install_uv
uv_settings
install_lock
printf '%s\n' "$WANTED" >$STAMP
