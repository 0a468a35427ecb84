"""`jdistill probe` against real sidecars, and against what is none."""

import json
import socket
import subprocess
import sys

import pytest

from jdistill import cli


def test_it_tells_model_limits_health_and_speed(start_sidecar, capsys):
    sidecar = start_sidecar("--served-name", "tiny", "--max-sequence-length", 300)
    assert cli.main(["probe", sidecar.address, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["endpoint"] == sidecar.address and facts["health"] == "SERVING" and facts["engine"] == "fake"
    model = facts["model"]
    assert (model["model"], model["vocab_size"], model["max_sequence_length"], model["dtype"]) == (
        "tiny",
        64,
        300,
        "float32",
    )
    assert len(model["fingerprint"]) == 64 and len(facts["instance_id"]) == 32
    assert 0 < facts["round_trip_ms"] < 1000
    assert facts["tokens_per_s"] > 1000
    assert cli.main(["probe", sidecar.address, "--tokens", "0"]) == 0
    table = capsys.readouterr().out
    assert "SERVING" in table and "tiny" in table and "300 tokens" in table and "tokens/s" not in table
    assert model["fingerprint"] in "".join(c for c in table if c.isalnum()), "a cut fingerprint cannot be compared"


def test_the_measured_speed_is_the_teachers(start_sidecar, capsys):
    # 4 sequences of 256 tokens, 50 ms each: at most 5,120 tokens/s.
    sidecar = start_sidecar("--engine-arg", "delay_s=0.05")
    assert cli.main(["probe", sidecar.address, "--json", "--tokens", "1024"]) == 0
    assert 1000 < json.loads(capsys.readouterr().out)["tokens_per_s"] < 5120


def test_nobody_there_is_1_with_a_remedy(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        assert cli.main(["probe", address]) == 1
    error = capsys.readouterr().err
    assert address in error and "jdistill teacher" in error and "Traceback" not in error


def test_a_teacher_that_loads_is_1_and_json_says_so_too(start_sidecar, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sidecar = start_sidecar("--port", port, "--engine-arg", "load_s=60", wait=False)
    while "listening" not in sidecar.log:
        assert sidecar.process.poll() is None, sidecar.log
    assert cli.main(["probe", f"127.0.0.1:{port}", "--json"]) == 1
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts["health"] == "NOT_SERVING" and "Try again" in facts["error"] and "Try again" in err


def test_an_address_that_is_none_is_2(capsys):
    assert cli.main(["probe", "http://localhost:50051"]) == 2
    assert "host:port" in capsys.readouterr().err
    assert cli.main(["probe", "localhost:50051", "--tokens", "-1"]) == 2
    assert "--tokens" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["probe", "score", "teacher"])
def test_help_teaches_by_example_without_loading_anything_heavy(command):
    code = (
        "import sys\nfrom jdistill import cli\n"
        f"try: cli.main(['{command}', '--help'])\n"
        "finally: print([m for m in ('jax', 'torch', 'vllm', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert f"  jdistill {command} " in done.stdout
    assert done.stderr.strip() == "[]"
