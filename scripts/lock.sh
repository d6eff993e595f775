#!/bin/sh
# Resolves pyproject.toml into requirements/cpu.lock and requirements/cuda.lock, for Python 3.11 to 3.13.
set -eu
cd "$(dirname "$0")/.."
for device in cpu cuda; do
    set -- --extra "$device" --extra dev --universal --python-version 3.11 --no-annotate --no-header
    if [ "$device" = cpu ]; then set -- "$@" --override requirements/overrides-cpu.txt; fi
    if [ -n "${PIP_FIND_LINKS:-}" ]; then set -- "$@" --find-links "$PIP_FIND_LINKS";
    elif [ "$device" = cpu ]; then set -- "$@" --torch-backend cpu; fi
    .venv/bin/uv pip compile --quiet pyproject.toml "$@" "${UPGRADE:---no-upgrade}" -o "requirements/$device.lock"
done
