"""Micro-benchmarks under pytest-benchmark: `make bench-micro`."""
