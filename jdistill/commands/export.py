"""`jdistill export`: writes a run's student as a Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import pathlib

from jdistill.text_files import read_json_object

DESCRIPTION = """\
Write a run's newest checkpoint as a Hugging Face directory (config.json, safetensors, tokenizer), which transformers,
vLLM and every jdistill command load: to evaluate it, serve it, train it further, or use it as the next run's teacher.

examples:
  jdistill export runs/demo --to exported/demo
  jdistill export runs/demo --to exported/demo-100 --step 100 --dtype float32
  jdistill export runs/lora --to exported/adapter --adapter

A run with model.lora has its adapters merged into the weights; --adapter writes only the adapters, in PEFT's format.

The directory is written atomically. exit codes: 0 written, 2 no such run or checkpoint, or DIR is not empty."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN", type=pathlib.Path, help="run directory of `jdistill train`")
    parser.add_argument(
        "--to", required=True, type=pathlib.Path, metavar="DIR", help="directory to write: new or empty"
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint (default: the newest)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the weights (default: that of the model the run started from); float32 keeps every bit",
    )
    parser.add_argument("--adapter", action="store_true", help="write only the adapters of a run with model.lora")
    parser.add_argument(
        "--source", type=pathlib.Path, metavar="DIR", help="model that the run started from, if it has moved"
    )


def run(args: argparse.Namespace) -> int:
    """Restores a checkpoint of the run and exports it."""

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jdistill import checkpoint_files, models
    from jdistill.config import MeshSection, ModelSection, parse
    from jdistill.fingerprint import model_fingerprint
    from jdistill.student import sharding
    from jdistill.student.checkpoint import restore_params

    config_file = args.run_dir / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{args.run_dir} has no config.json: it is not the directory of a `jdistill train` run")
    stored = read_json_object(config_file).get("model") or {}
    section = parse(ModelSection, stored, source=f"model of {config_file}")
    source = args.source or pathlib.Path(section.path)
    if not source.is_dir():
        raise FileNotFoundError(
            f"the run started from {source}, which no longer exists; its config.json and tokenizer are needed: "
            "give its present path with --source DIR"
        )
    if args.to.exists() and not (args.to.is_dir() and not any(args.to.iterdir())):
        raise ValueError(f"--to {args.to} exists: remove it, or write somewhere else")
    lora = models.lora_of(section.lora)
    if args.adapter and lora is None:
        raise ValueError(f"--adapter: {args.run_dir} was trained without model.lora: omit it to export the whole model")
    # Shard over all local devices: a model that was trained sharded may not fit on one.
    mesh = sharding.make_mesh(MeshSection(data=1, fsdp=-1), devices=jax.local_devices())
    if lora is None:
        model_config = models.config_from_hf(source)
        decoder = nnx.eval_shape(lambda: models.Decoder(model_config, rngs=nnx.Rngs(0)))
        shapes = nnx.state(decoder, nnx.Param)
        zeros = jax.jit(
            lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            out_shardings=models.param_shardings(decoder, mesh),
        )
        nnx.update(decoder, zeros())
    else:
        decoder = models.load(source, mesh=mesh, lora=lora)
    base = None if lora is None else model_fingerprint(source, section.compute_dtype)
    step = restore_params(args.run_dir, decoder, args.step, kind=models.trained_kind(decoder.config), base=base)
    if args.adapter:
        models.save_adapter(decoder, args.to, base=source)
        print(f"{args.to}: step {step} of {args.run_dir}, adapters for {source}")
        return 0
    dtype = args.dtype or _source_dtype(checkpoint_files.read_config(source))
    models.save(models.merge_lora(decoder), args.to, source=source, dtype=dtype)
    print(f"{args.to}: step {step} of {args.run_dir}, {dtype}")
    return 0


def _source_dtype(hf_config: dict) -> str:
    named = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32").removeprefix("torch.")
    return named if named in ("float32", "bfloat16") else "bfloat16"  # not float16, which can overflow
