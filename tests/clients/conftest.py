"""The example clients in other languages, built outside the source tree; kept in pytest's cache from run to run."""

import functools
import os
import pathlib
import platform
import shutil
import subprocess

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]
CLIENTS = REPOSITORY / "examples" / "clients"
BUILD_TIMEOUT_S = 240


def run_quietly(*command, **arguments):
    """The output of a step; a failure shows it."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        **arguments,
    )
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}"
    return done.stdout


def build_node(directory):
    """The command of the Node client, run from a copy of what it needs: its packages must lie beside it."""
    if shutil.which("npm") is None:
        pytest.skip("Node's npm is not here (Debian: apt-get install npm)")
    version = tuple(int(part) for part in run_quietly("node", "--version").strip().lstrip("v").split("."))
    if not ((20, 15) <= version < (21,) or version >= (22, 2)):
        pytest.skip(f"Node {version} is too old, see engines in examples/clients/node/package.json")
    for path in ("protos", "examples/clients"):
        shutil.copytree(
            REPOSITORY / path, directory / path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("node_modules")
        )
    client = directory / "examples/clients/node"
    lock, done = client / "package-lock.json", directory / "npm-ci-done"
    if not done.exists() or done.read_text() != lock.read_text():
        run_quietly("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=client)
        done.write_text(lock.read_text())
    return ["node", str(client / "score.js")]


def build_cpp(directory):
    """The command of the C++ client; what of gRPC is not installed, apt fetches into `directory`."""
    for tool in ("make", os.environ.get("CXX", "g++")):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not here (Debian: apt-get install make g++)")
    sysroot = []
    if not (shutil.which("protoc") and shutil.which("grpc_cpp_plugin") and _finds_headers()):
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None or platform.system() != "Linux":
            pytest.skip("not here: libgrpc++-dev protobuf-compiler-grpc nlohmann-json3-dev zlib1g-dev, and no apt-get")
        sysroot = [f"SYSROOT={directory / 'sysroot'}"]
    build = directory / ("build-sysroot" if sysroot else "build")
    # -O0: half the time to build, and the numbers are Python's to compare.
    run_quietly("make", "-C", CLIENTS / "cpp", "-j2", f"BUILD={build}", "CXXFLAGS=-O0 -Wall -Wextra -Werror", *sysroot)
    return [str(build / "score")]


def _finds_headers():
    source = "#include <grpcpp/grpcpp.h>\n#include <nlohmann/json.hpp>\n#include <zlib.h>\n"
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-M", "-x", "c++", "-", "-o", os.devnull]
    return subprocess.run(command, input=source, text=True, stderr=subprocess.DEVNULL, timeout=60).returncode == 0


BUILDERS = {"node": build_node, "cpp": build_cpp}


@functools.cache
def _build(name, directory):
    return BUILDERS[name](directory)


@pytest.fixture(params=sorted(BUILDERS))
def client(request):
    """The command line, so far, of each client."""
    return _build(request.param, request.config.cache.mkdir(f"clients-{request.param}"))
