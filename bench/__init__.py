"""Measurements of ckptd, run by `make bench` and `make bench-shards`."""
