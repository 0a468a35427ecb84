"""The sides of `make bench-student`: jdistill, Tunix, PyTorch; each task a process (`python -m benchmarks.peers.SIDE TASK`)."""
