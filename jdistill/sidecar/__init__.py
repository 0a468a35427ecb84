"""The sidecar: a service over one engine. Imports no jax outside engines/jax.py."""
