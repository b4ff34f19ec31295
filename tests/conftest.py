"""Shared by all tests; needs nothing."""

import os

# Two threads a process are what the smallest supported machine has; tests run side by side.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
