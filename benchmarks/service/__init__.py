"""`make bench-service`: the teacher service against the engine in process, vLLM's HTTP server, and other wires."""
