"""Benchmarks and the demo: real servers, real requests, ours beside plain SGLang in one run."""
