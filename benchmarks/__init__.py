"""Benchmarks: `python -m benchmarks.<name> [--quick] [--json]`, from the root of the checkout."""

import sys
from pathlib import Path

# `support` has the servers, clusters, faults and neighbours of the tests.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
