"""The `jdistill` command where only a part of its dependencies is installed."""

import subprocess
import sys

from jdistill import cli

# Everything but the dependencies of the client.
WITH_THE_CLIENT_ALONE = """
import sys
for name in ("flax", "grpc_reflection", "jax", "optax", "orbax", "prometheus_client", "pydantic", "pythonjsonlogger",
             "rich", "ruamel", "tokenizers", "torch", "transformers", "vllm"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
from jdistill import cli
for command in cli.COMMANDS:
    try:
        code = cli.main([command, "--help"])
    except SystemExit as e:
        code = e.code
    print(f"exit code of {command}: {code}", flush=True)
"""


def test_help_with_the_client_alone_explains_the_command_or_names_what_to_install():
    found = subprocess.run([sys.executable, "-c", WITH_THE_CLIENT_ALONE], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr  # a command that raises anything ends the loop
    remedies = {line.partition(":")[0].split()[1]: line for line in found.stderr.splitlines()}
    for command in cli.COMMANDS:
        needs = command in remedies
        assert f"exit code of {command}: {int(needs)}\n" in found.stdout
        assert needs or f"usage: jdistill {command}" in found.stdout
    assert remedies["eval"] == "jdistill eval: needs pydantic, which is not installed: pip install 'jdistill[cli]'"
