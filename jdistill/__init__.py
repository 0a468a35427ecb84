"""Reinforcement learning plus on-policy distillation in JAX, with a teacher behind gRPC."""

import os
import sys

__version__ = "0.1.0"

# gRPC's own handling of fork() crashes every other child of a process with calls of its asyncio API in flight, whatever
# the child does. gRPC reads this variable when it is imported. The user's own setting stands.
GRPC_HANDLES_FORK = os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "1" if "grpc" in sys.modules else "0") != "0"
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
