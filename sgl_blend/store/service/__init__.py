"""The store's process: its loop, its verbs, loads and leases."""
