"""`jdistill export`: a run's student as a Hugging Face checkpoint."""

from __future__ import annotations

import argparse
import pathlib

DESCRIPTION = """\
Write a run's newest checkpoint as a Hugging Face directory (config.json, safetensors, tokenizer), which transformers,
vLLM and every jdistill command load: to evaluate or serve it, to go on from it, or to make it the next run's teacher.

examples:
  jdistill export runs/demo --to exported/demo
  jdistill export runs/demo --to exported/demo-100 --step 100 --dtype float32
  jdistill export runs/lora --to exported/adapter --adapter

Of a run with model.lora the adapters are merged into the weights; --adapter writes them alone, in PEFT's format.

The directory appears whole or not at all. exit codes: 0 written, 2 no such run or checkpoint, or DIR is taken."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN", type=pathlib.Path, help="a directory of `jdistill train`")
    parser.add_argument("--to", required=True, type=pathlib.Path, metavar="DIR", help="must not exist yet")
    parser.add_argument("--step", type=int, metavar="N", help="default: the newest checkpoint")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights; default: that of the model the run started from. float32 keeps every bit",
    )
    parser.add_argument("--adapter", action="store_true", help="the adapters of a run with model.lora, and no weights")
    parser.add_argument(
        "--source", type=pathlib.Path, metavar="DIR", help="the model the run started from, if it has moved since"
    )


def run(args: argparse.Namespace) -> int:
    """Restores, writes, prints where."""
    import json

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jdistill import checkpoint_files, models
    from jdistill.config import MeshSection, TrainConfig, parse
    from jdistill.fingerprint import model_fingerprint
    from jdistill.student import sharding
    from jdistill.student.checkpoint import restore_params

    config_file = args.run_dir / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{args.run_dir} has no config.json: it is not the directory of a `jdistill train` run")
    section = parse(TrainConfig, json.loads(config_file.read_text()), source=str(config_file)).model
    source = args.source or pathlib.Path(section.path)
    if not source.is_dir():
        raise FileNotFoundError(
            f"the run started from {source}, which is not there (any more): its config.json and tokenizer are needed; "
            "say where it is now with --source DIR"
        )
    if args.to.exists() and not (args.to.is_dir() and not any(args.to.iterdir())):
        raise ValueError(f"--to {args.to} exists: remove it, or write somewhere else")
    lora = models.lora_of(section.lora)
    if args.adapter and lora is None:
        raise ValueError(f"--adapter: {args.run_dir} was trained without model.lora: leave it out for the whole model")
    # Over all local devices: a model that was trained sharded need not fit one.
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
        print(f"{args.to}: step {step} of {args.run_dir}, the adapters on {source}")
        return 0
    dtype = args.dtype or _source_dtype(checkpoint_files.read_config(source))
    models.save(models.merge_lora(decoder), args.to, source=source, dtype=dtype)
    print(f"{args.to}: step {step} of {args.run_dir}, {dtype}")
    return 0


def _source_dtype(hf_config: dict) -> str:
    named = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32").removeprefix("torch.")
    return named if named in ("float32", "bfloat16") else "bfloat16"  # float16 overflows where bfloat16 does not
