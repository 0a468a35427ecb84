"""Options of a sidecar: the model and its engine, the server around it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from jdistill.config.section import Section


class EngineSection(Section):
    """A model, the engine that serves it, and its size. An engine refuses at start what it cannot do."""

    engine: str = Field(
        description="what computes the scores: vllm, sglang, transformers or jax; vllm-http or sglang-http in front of "
        "a running server"
    )
    model: str = Field(
        description="checkpoint directory: config.json, *.safetensors, tokenizer files; vllm-http and sglang-http need "
        "only config.json and the tokenizer files"
    )
    urls: list[str] | None = Field(
        None,
        description="vllm-http, sglang-http: address of the running server, e.g. http://127.0.0.1:8000; several are "
        "refused, start one sidecar per server",
    )
    served_name: str | None = Field(None, description="model name that clients see; null: the directory's name")
    adapters: dict[str, str] = Field({}, description="LoRA adapters: name that clients use -> PEFT directory")
    dtype: str = Field("auto", description="float32, bfloat16, float16, or auto for the checkpoint's own")
    quantization: str | None = Field(
        None, description="quantization by the engine's own name, e.g. fp8; null: as the checkpoint says"
    )
    max_sequence_length: int | None = Field(
        None, description="longest sequence in tokens, prompt and response; null: the checkpoint's limit"
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share each layer (vllm, sglang)")
    pipeline_parallel_size: int = Field(1, ge=1, description="groups of GPUs that share the layers (vllm, sglang)")
    data_parallel_size: int = Field(1, ge=1, description="copies of the model in this sidecar (vllm, sglang)")
    memory_fraction: float | None = Field(
        None, gt=0, le=1, description="share of each GPU's memory that the engine may use; null: the engine's default"
    )
    max_batch_tokens: int = Field(16384, ge=1, description="tokens of one forward pass (transformers, jax)")
    offload: bool = Field(False, description="allow Sleep and Wake, which free the GPU's memory between scoring phases")
    engine_args: dict[str, Any] = Field(
        {}, description="arguments of the engine by its own names, e.g. max_num_seqs=64; the engine checks them"
    )


class TeacherServerConfig(EngineSection):
    """`jdistill teacher`: one sidecar. The command's flags have the same names."""

    host: str = Field("127.0.0.1", description="address to listen on")
    insecure: bool = Field(False, description="allow a host beyond loopback without TLS, and serve metrics there")
    port: int = Field(50051, ge=0, le=65535, description="port to listen on; 0: any free port, see port_file")
    port_file: str | None = Field(None, description="file that receives the bound port once the server listens")
    tls_cert: str | None = Field(
        None, description="PEM file: this server's certificate chain; with tls_key, clients must use TLS"
    )
    tls_key: str | None = Field(None, description="PEM file: this server's private key")
    tls_client_ca: str | None = Field(
        None, description="PEM file: clients must show a certificate signed by this authority (mTLS)"
    )
    token_file: str | None = Field(
        None, description="file of accepted bearer tokens, one per line, each with an optional ISO 8601 expiry date"
    )
    max_running_tokens: int = Field(131_072, ge=1, description="tokens in the engine at once")
    # 1 Mi tokens are 4 MiB of ids, and seconds to minutes of work.
    max_queued_tokens: int = Field(
        1 << 20,
        ge=1,
        description="tokens that may wait, over all clients; beyond that, calls are refused with RESOURCE_EXHAUSTED",
    )
    on_sleep: Literal["wake", "refuse"] = Field(
        "wake", description="wake: a score call wakes a sleeping teacher; refuse: it is refused with UNAVAILABLE"
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port for Prometheus metrics at http://HOST:PORT/metrics; 0: any free port; null: no metrics",
    )
    log_format: Literal["text", "json"] = Field("text", description="format of the log: text or json")
    drain_timeout_s: float = Field(30.0, ge=0, description="seconds that running calls have to finish after SIGTERM")
