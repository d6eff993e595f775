"""All measurements, short: `make bench`, or python -m benchmarks [name ...]. Results as JSON under bench-results/.

Each runs in a process of its own; the first failure ends the rest. Longer ones: python -m benchmarks.<name> --help.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path("bench-results")
SHORT = {
    "router_core": ["benchmarks.router_core", "--waiting", "10000", "--events", "5000"],
    "transport": ["benchmarks.transport", "--seconds", "4"],
    "ordering": ["benchmarks.ordering", "--seeds", "1", "--counted", "12"],
    "goodput": ["benchmarks.goodput", "--quick"],
    "overhead": ["benchmarks.overhead", "--repetitions", "3", "--scale", "0.7"],
    "overhead_simulated": ["benchmarks.overhead", "--engine", "simulated", "--seconds", "10"],
}


def main() -> int:
    """Run what was asked for, all by default; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"some of {', '.join(SHORT)}; default: all")
    names = parser.parse_args().names or list(SHORT)
    unknown = [name for name in names if name not in SHORT]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(SHORT)}")
    RESULTS.mkdir(exist_ok=True)
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    (RESULTS / "machine.json").write_text(json.dumps(machine, indent=1))
    for name in names:
        print(f"== {name}", flush=True)
        module, *arguments = SHORT[name]
        program = [sys.executable, "-m", module, "--json", str(RESULTS / f"{name}.json"), *arguments]
        status = subprocess.run(program, check=False).returncode
        if status:
            print(f"{name} failed with status {status}", file=sys.stderr)
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
