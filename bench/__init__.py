"""Measured claims: `make bench`. Ratios from one run; no timed tests."""
