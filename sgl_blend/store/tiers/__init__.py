"""Places for chunks below shared memory. ``base`` is the contract; one file a tier."""
