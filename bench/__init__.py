"""Benchmarks: what specdec claims about speed, measured. See bench/run.py."""
