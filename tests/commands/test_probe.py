"""`jdistill probe` against real sidecars, and against what is none."""

import json
import socket
import subprocess
import sys

import pytest

from jdistill import cli
from jdistill.client import TeacherClient
from tests.sidecar.certificates import Authority


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
    assert facts["round_trip_ms"] > 0 and facts["tokens_per_s"] > 0
    assert cli.main(["probe", sidecar.address, "--tokens", "0"]) == 0
    table = capsys.readouterr().out
    assert "SERVING" in table and "tiny" in table and "300 tokens" in table and "tokens/s" not in table
    assert model["fingerprint"] in "".join(c for c in table if c.isalnum()), "a cut fingerprint cannot be compared"


def test_the_measured_speed_is_the_teachers(start_sidecar, capsys):
    # 4 sequences of 256 tokens, 50 ms each: at most 5,120 tokens/s.
    sidecar = start_sidecar("--engine-arg", "delay_s=0.05")
    assert cli.main(["probe", sidecar.address, "--json", "--tokens", "1024"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["tokens_per_s"] < 5120


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


def test_a_teacher_that_loads_gets_a_table_of_what_is_known(start_sidecar, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sidecar = start_sidecar("--port", port, "--engine-arg", "load_s=60", wait=False)
    while "listening" not in sidecar.log:
        assert sidecar.process.poll() is None, sidecar.log
    assert cli.main(["probe", f"127.0.0.1:{port}"]) == 1
    table = capsys.readouterr().out
    assert "LOADING" in table and "fake" in table and "256 MiB" in table and "vocabulary" not in table


def test_adapters_limits_and_the_speed_with_top_k_are_told(start_sidecar, capsys, tmp_path):
    sidecar = start_sidecar("--adapter", f"tutor={tmp_path}", "--max-queued-tokens", 12345)
    assert cli.main(["probe", sidecar.address, "--json", "--tokens", "512", "--top-k", "8"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [model["model"] for model in facts["models"]] == [facts["model"]["model"], "tutor"]
    assert facts["models"][1]["base_model"] == facts["model"]["model"]
    assert facts["max_queued_tokens"] == 12345 and facts["state"] == "SERVING" and facts["can_sleep"] is False
    assert facts["top_k"] == 8 and facts["top_k_tokens_per_s"] > 1000 < facts["tokens_per_s"]
    assert cli.main(["probe", sidecar.address, "--tokens", "512", "--top-k", "8"]) == 0
    table = capsys.readouterr().out
    assert "adapter tutor" in table and "12,345 tokens" in table and "with top-8" in table
    assert cli.main(["probe", sidecar.address, "--tokens", "512", "--top-k", "65"]) == 2
    assert "top_k = 65" in capsys.readouterr().err


@pytest.mark.parametrize("on_sleep, health, code", [("wake", "SERVING", 0), ("refuse", "NOT_SERVING", 1)])
def test_a_sleeping_teacher_is_left_asleep_unless_wake_is_asked(start_sidecar, capsys, on_sleep, health, code):
    sidecar = start_sidecar("--offload", "--on-sleep", on_sleep)
    with TeacherClient([sidecar.address]) as client:
        client.sleep()
    for _ in range(2):  # the first probe did not wake it
        assert cli.main(["probe", sidecar.address, "--json"]) == code
        facts = json.loads(capsys.readouterr().out)
        assert (facts["state"], facts["health"], facts["can_sleep"]) == ("SLEEPING", health, True)
        assert "tokens_per_s" not in facts and ("--wake" in facts.get("error", "")) == (code == 1)
    cli.main(["probe", sidecar.address])
    assert "not measured: it sleeps (--wake)" in capsys.readouterr().out
    assert cli.main(["probe", sidecar.address, "--json", "--wake"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["health"]) == ("SERVING", "SERVING") and facts["tokens_per_s"] > 1000


def test_with_credentials_it_tells_the_certificate_and_without_them_what_is_missing(start_sidecar, capsys, tmp_path):
    authority = Authority(tmp_path)
    tokens = tmp_path / "tokens"
    tokens.write_text("secret-of-mine\n")
    tokens.chmod(0o600)
    sidecar = start_sidecar(*authority.server_flags(), "--tls-client-ca", authority.ca, "--token-file", tokens)
    cert, key = authority.pair("trainer", file="client")
    own = ["--tls-cert", cert, "--tls-key", key]
    argv = ["probe", sidecar.address, "--tokens", "256"]
    right = [*argv, "--tls-ca", authority.ca, *own, "--token-file", str(tokens)]
    assert cli.main([*right, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["certificate"] == {"subject": "127.0.0.1, localhost", "expires": "3000-01-01T00:00:00+00:00"}
    assert facts["tokens_per_s"] > 100
    assert cli.main(right) == 0
    assert "127.0.0.1, localhost, until 3000-01-01" in capsys.readouterr().out
    wrong = tmp_path / "wrong"
    wrong.write_text("guess\n")
    stranger = Authority(tmp_path, "stranger")
    for changed, code, message in (
        ([*argv, "--token-file", str(tokens)], 1, "speaks TLS"),
        ([*argv, "--tls-ca", authority.ca, "--token-file", str(tokens)], 1, "wants a client certificate"),
        ([*argv, "--tls-ca", stranger.ca, *own, "--token-file", str(tokens)], 1, "not signed by the authority"),
        ([*argv, "--tls-ca", authority.ca, *own], 1, "no token"),
        ([*argv, "--tls-ca", authority.ca, *own, "--token-file", str(wrong)], 1, "wrong token"),
        ([*argv, *own], 2, "tls_ca"),
        ([*argv, "--tls-ca", authority.ca, "--tls-cert", cert], 2, "tls_key is missing"),
        ([*argv, "--tls-ca", str(tokens)], 2, "no certificate in PEM format"),
        ([*argv, "--token-file", str(tmp_path / "none")], 2, "cannot be read"),
    ):
        assert cli.main(changed) == code, changed
        out, err = capsys.readouterr()
        assert message in err and "Traceback" not in err, err
        assert "secret-of-mine" not in out + err and "guess" not in out + err


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
