"""Speed and accuracy, measured: each module here is a command, ``python -m benchmarks.<name>``."""
