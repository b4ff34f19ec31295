"""Where chunks lie: memory, disk or a cluster's engine, and what has to make room."""
