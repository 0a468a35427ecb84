"""`make bench-service`: the teacher service beside the engine in process, vLLM's HTTP server, and other wires."""
