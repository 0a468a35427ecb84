"""The sides of `make bench-student`, each task a process: `python -m benchmarks.peers.SIDE TASK`."""
