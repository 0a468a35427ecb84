"""`jdistill teacher`: serve a model's token log-probabilities over gRPC."""

from __future__ import annotations

import argparse
import json
import types
import typing
from typing import Any

from jdistill.config import ConfigError, TeacherServerConfig, describe, load

DESCRIPTION = """\
Serve a model's token log-probabilities over gRPC.

  jdistill teacher --engine vllm --model checkpoints/Qwen3-14B --tensor-parallel-size 2
  jdistill teacher --engine transformers --model checkpoints/Qwen3-0.6B --port 0 --port-file teacher.port
  jdistill teacher configs/teacher_vllm.yaml model=checkpoints/Qwen3-14B memory_fraction=0.8
  jdistill teacher --engine vllm --model checkpoints/Qwen3-14B --host 0.0.0.0 \
      --tls-cert server.pem --tls-key server.key --token-file tokens --metrics-port 9090 --log-format json

The port is bound first and the model loaded then: health (grpc.health.v1) says NOT_SERVING until calls are answered.
SIGTERM or Ctrl-C drains the sidecar: running calls may finish, new ones are refused. `jdistill probe HOST:PORT` shows
what runs there. Exit codes: 0 stopped, 1 the engine died, 2 it cannot start as configured.

Beyond loopback it listens only with TLS or --insecure. Certificate and token files are read again when they change. The
token file has one token per line, optionally followed by an expiry (2030-01-31T12:00:00Z), and # comments; every call
except grpc.health.v1 must carry one as "authorization: Bearer TOKEN". Metrics are plain HTTP, so they are served on
loopback only, unless --insecure is given; with --port-file, their port is written to that name plus ".metrics".
"""

HELP = {option.name: option.description for option in describe.options(TeacherServerConfig)}

# Flags that are given once per entry of a list or mapping, with their metavar.
REPEATED = {
    name: (describe.flag(TeacherServerConfig, name), metavar)
    for name, metavar in {"engine_args": "NAME=VALUE", "adapters": "NAME=DIR", "urls": "URL"}.items()
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See jdistill.commands."""
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="configuration file; flags come on top of it")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the configuration file")
    add_config_arguments(parser, HELP)
    parser.add_argument(
        "--exit-with-parent",
        type=int,
        nargs="?",
        const=0,
        metavar="PID",
        help="end when the process that started this one ends (its PID, if given, is checked)",
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])


def add_config_arguments(parser: argparse.ArgumentParser, help_of: dict[str, str]) -> None:
    """Adds a flag for each field of TeacherServerConfig in `help_of`; absent ones stay None."""
    for name, text in help_of.items():
        field = TeacherServerConfig.model_fields[name]
        flag = "--" + name.replace("_", "-")
        if name in REPEATED:
            flag, metavar = REPEATED[name]
            parser.add_argument(flag, action="append", default=[], metavar=metavar, dest=name, help=text)
            continue
        if field.annotation is bool:
            parser.add_argument(flag, action="store_const", const=True, help=text)
            continue
        kind = _plain_type(field.annotation)
        default = "" if field.is_required() or field.default is None else f" (default: {field.default})"
        parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text + default)


def config_of(args: argparse.Namespace, names: typing.Iterable[str], path: str | None, overrides: list[str]) -> Any:
    """Returns the TeacherServerConfig from a YAML file (or None), dotted overrides and the flags of `names`.

    Raises:
        ConfigError: a key is given twice, is unknown, missing or of the wrong type.
    """
    given = [override.partition("=")[0] for override in overrides]
    assignments = list(overrides)
    for name in names:
        if name in REPEATED:
            flag, metavar = REPEATED[name]
            if "=" not in metavar:
                if getattr(args, name):
                    assignments.append(f"{name}={json.dumps(getattr(args, name))}")
                    given.append(name)
                continue
            for assignment in getattr(args, name):
                if "=" not in assignment:
                    raise ConfigError(f"{flag} {assignment}: expected {metavar}")
                if name == "adapters" and "." in assignment.partition("=")[0]:
                    raise ConfigError(f"{flag} {assignment}: the name of an adapter has no dots")
                assignments.append(f"{name}.{assignment}")
                given.append(f"{name}.{assignment.partition('=')[0]}")
        elif getattr(args, name) is not None:
            assignments.append(f"{name}={json.dumps(getattr(args, name))}")  # JSON is YAML, and says string or number
            given.append(name)
    for key in given:
        if given.count(key) > 1:
            raise ConfigError(f"{key} is given {given.count(key)} times; give it once")
    if path is None:
        for name, field in TeacherServerConfig.model_fields.items():
            if field.is_required() and name not in given:
                raise ConfigError(f"--{name} is missing ({HELP[name]})")
    return load(TeacherServerConfig, path, assignments)


def _plain_type(annotation: Any) -> type:
    """Returns `int` for `int | None`, and so on."""
    if typing.get_origin(annotation) is typing.Literal:
        return str
    if isinstance(annotation, types.UnionType):
        (annotation,) = (kind for kind in typing.get_args(annotation) if kind is not type(None))
    return annotation


def run(args: argparse.Namespace) -> int:
    """See jdistill.commands."""
    if args.config is not None and "=" in args.config:
        raise ConfigError(f"{args.config}: changes come after a configuration file; without one use flags (--help)")
    config = config_of(args, HELP, args.config, args.overrides)
    from jdistill.sidecar.logs import configure

    configure(config.log_format, args.log_level)
    from jdistill.sidecar.process import exit_soon, exit_with_parent
    from jdistill.sidecar.server import serve

    if args.exit_with_parent is not None:
        exit_with_parent(args.exit_with_parent or None)
    code = serve(config)
    exit_soon(code)
    return code
