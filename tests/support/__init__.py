"""Servers, faults, Ray clusters and sample data that tests and benchmarks share."""
