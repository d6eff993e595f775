#!/bin/sh
# Writes the Python stubs of cluster/wire.proto, with types, under the folder given (default: the repository).
# protoc runs from the root, so that the module is `cluster.wire_pb2` for every process that unpickles a message.
set -eu
cd "$(dirname "$0")/.."
out=${1:-.}
PATH="$PWD/.venv/bin:$PATH" python -m grpc_tools.protoc -I . \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" cluster/wire.proto
