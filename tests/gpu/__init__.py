"""What is to be run on a GPU first (``run_all``): one module a phase. docs/cuda.md says how."""
