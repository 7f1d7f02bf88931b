"""Benchmarks: `python -m bench` measures, prints a table with ratios, and stores results. See README.md."""
