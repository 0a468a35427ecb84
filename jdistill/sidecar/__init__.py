"""The teacher's process: a gRPC service over one engine; no jax outside engines/jax.py."""
