"""The vLLM engine: engine, ways of scoring, startup, and the code that runs in vLLM's workers."""

import os

# vLLM writes its log to stdout by default, which belongs to the command's output. Set before anything imports vLLM.
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
