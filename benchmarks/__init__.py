"""Benchmarks: `python -m benchmarks.NAME [--quick] --json` prints one object of rows."""
