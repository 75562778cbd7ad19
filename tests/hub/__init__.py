"""A small hub on loopback, for tests and benchmarks: ``hub.server``."""
