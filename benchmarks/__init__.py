"""Benchmarks: `python -m benchmarks.<name> [--quick] [--json]`, from the root of the checkout."""
