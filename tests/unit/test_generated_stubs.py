"""What protoc wrote is what it would write now."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_stubs_of_the_messages_are_current(tmp_path: Path) -> None:
    subprocess.run([ROOT / "scripts" / "generate_stubs.sh", tmp_path], check=True, capture_output=True)

    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*"))
    assert [path.name for path in written] == ["wire_pb2.py", "wire_pb2.pyi", "wire_pb2_grpc.py", "wire_pb2_grpc.pyi"]
    for path in written:
        if (tmp_path / path).read_text() != (ROOT / path).read_text():
            pytest.fail(f"{path} differs from cluster/wire.proto; run `make proto`")
