"""TLS, client certificates and tokens between real sidecars and TeacherClients; refusals name the remedy."""

import datetime
import os
import pathlib
import ssl
import subprocess
import time

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jdistill.client import SequenceToScore, TeacherClient
from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.sidecar import security, server
from jdistill.sidecar.engines import fake
from jdistill.wire import credentials
from jdistill.wire.errors import TeacherError, UnauthenticatedError
from jdistill.wire.v1 import teacher_pb2, teacher_pb2_grpc
from tests.sidecar.certificates import EXPIRED, Authority

SECRET = "correct-horse-battery-staple"
FAST_S = 60.0  # an error that no retry can fix is raised long before DEADLINE_S
DEADLINE_S = 300.0


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def score(client, length=8):
    (scores,) = client.score([SequenceToScore(np.arange(length, dtype=np.int32))])
    full_PV = fake.logprobs_PV(np.arange(length), np.arange(1, length), vocab_size=64)
    np.testing.assert_allclose(scores.logprobs, full_PV[np.arange(length - 1), np.arange(1, length)], rtol=1e-6)


def client_of(sidecar, *, tls=None, token=None):
    return TeacherClient([sidecar.address], deadline_s=DEADLINE_S, credentials=tls, token=token)


def assert_fails_fast(sidecar, message, **arguments):
    begin = time.monotonic()
    with client_of(sidecar, **arguments) as client, pytest.raises(TeacherError, match=message) as caught:
        score(client)
    assert time.monotonic() - begin < FAST_S, "waited for an error that no retry can fix"
    assert sidecar.address in str(caught.value)
    return caught.value


def token_file(tmp_path, *lines):
    path = tmp_path / "tokens"
    temporary = tmp_path / "tokens.new"
    temporary.write_text("".join(f"{line}\n" for line in lines))
    temporary.chmod(0o600)
    temporary.replace(path)
    return str(path)


# ---- TLS ----


def test_tls_serves_clients_that_trust_its_authority_and_tells_others_the_remedy(start_sidecar, authority, tmp_path):
    sidecar = start_sidecar(*authority.server_flags())
    with client_of(sidecar, tls=credentials.channel_credentials(ca=authority.ca)) as client:
        score(client)
    assert_fails_fast(sidecar, "speaks TLS.*tls_ca", tls=None)
    stranger = Authority(tmp_path, "stranger")
    assert_fails_fast(sidecar, "not signed by the authority", tls=credentials.channel_credentials(ca=stranger.ca))


def test_a_tls_client_of_a_plain_text_server_is_told_so(start_sidecar, authority):
    sidecar = start_sidecar()
    assert_fails_fast(sidecar, "speaks plain text", tls=credentials.channel_credentials(ca=authority.ca))


def test_a_certificate_for_another_host_is_refused_with_the_remedy(start_sidecar, authority):
    cert, key = authority.pair("teacher.example.org")
    sidecar = start_sidecar("--tls-cert", cert, "--tls-key", key)
    assert_fails_fast(sidecar, "not for the host", tls=credentials.channel_credentials(ca=authority.ca))


def test_mtls_serves_only_clients_with_a_certificate_of_its_authority(start_sidecar, authority, tmp_path):
    sidecar = start_sidecar(*authority.server_flags(), "--tls-client-ca", authority.ca)
    cert, key = authority.pair("trainer", file="client")
    with client_of(sidecar, tls=credentials.channel_credentials(ca=authority.ca, cert=cert, key=key)) as client:
        score(client)
    assert_fails_fast(sidecar, "client certificate", tls=credentials.channel_credentials(ca=authority.ca))
    cert, key = Authority(tmp_path, "stranger").pair("trainer", file="client")
    wrong = credentials.channel_credentials(ca=authority.ca, cert=cert, key=key)
    assert_fails_fast(sidecar, "client certificate", tls=wrong)
    assert_fails_fast(sidecar, "speaks TLS", tls=None)


def test_a_certificate_that_is_replaced_on_disk_is_used_without_a_restart(start_sidecar, authority, tmp_path):
    cert, key = authority.pair()
    sidecar = start_sidecar("--tls-cert", cert, "--tls-key", key)
    with client_of(sidecar, tls=credentials.channel_credentials(ca=authority.ca)) as client:
        score(client)
        # First a certificate without its key, as between two writes: the old pair stays in use.
        os.replace(Authority(tmp_path, "half").pair()[0], cert)
        assert credentials.server_certificate(sidecar.address, ca=authority.ca).subject == "127.0.0.1, localhost"
        assert "the previous one is kept" in sidecar.log
        successor = Authority(tmp_path, "successor")
        for new, old in zip(successor.pair("127.0.0.1", "renewed.example.org"), (cert, key), strict=True):
            os.replace(new, old)
        seen = credentials.server_certificate(sidecar.address, ca=successor.ca)
        assert seen.subject == "127.0.0.1, renewed.example.org"
        with client_of(sidecar, tls=credentials.channel_credentials(ca=successor.ca)) as newcomer:
            score(newcomer)
        score(client)  # a connection outlives the certificate that it began with


def test_credentials_that_cannot_work_are_refused_at_start_with_the_remedy(tmp_path, authority):
    cert, key = authority.pair()
    old_cert, old_key = authority.pair(file="old", **EXPIRED)
    other_key = authority.pair(file="other")[1]
    locked = tmp_path / "locked.key"
    command = ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", str(locked)]
    subprocess.run(command, check=True, capture_output=True)
    empty = tmp_path / "empty"
    empty.write_text("# no tokens yet\n")
    for fields, message in (
        ({"tls_cert": cert}, "tls_key is missing"),
        ({"tls_key": key}, "tls_cert is missing"),
        ({"tls_client_ca": authority.ca}, "--tls-cert and --tls-key too"),
        ({"tls_cert": cert, "tls_key": other_key}, f"{other_key} is not the key of the certificate in"),
        ({"tls_cert": cert, "tls_key": str(locked)}, "tls_key is encrypted.*openssl pkey"),
        ({"tls_cert": old_cert, "tls_key": old_key}, "has expired: get a new certificate"),
        ({"tls_cert": key, "tls_key": key}, "not a certificate and its private key in PEM format"),
        ({"tls_cert": cert, "tls_key": str(tmp_path / "no.key")}, "no.key: cannot be read"),
        ({"tls_cert": cert, "tls_key": key, "tls_client_ca": key}, f"tls_client_ca {key}: it contains no certificate"),
        ({"token_file": str(tmp_path / "none")}, "token_file .*none: cannot be read"),
        ({"token_file": str(empty)}, "contains no token.*openssl rand"),
    ):
        config = TeacherServerConfig(engine="fake", model="m", port=0, **fields)
        with pytest.raises(ConfigError, match=message):
            server.serve(config)


# ---- where it listens ----


BEYOND = {"engine": "fake", "model": "m", "host": "0.0.0.0"}


@pytest.mark.parametrize(
    "fields, message",
    [
        ({}, "any client could use this teacher.*--tls-cert and --tls-key.*--insecure"),
        ({"token_file": "t"}, "the tokens could be read on the way.*--tls-cert and --tls-key.*--insecure"),
    ],
)
def test_listening_beyond_loopback_requires_tls_or_insecure(fields, message):
    with pytest.raises(ConfigError, match=message):
        security.check_exposure(TeacherServerConfig(**BEYOND, **fields))
    security.check_exposure(TeacherServerConfig(**BEYOND, **fields, insecure=True))


@pytest.mark.parametrize(
    "fields, warns",
    [({}, True), ({"token_file": "t"}, False), ({"tls_client_ca": "a"}, False), ({"insecure": True}, False)],
)
def test_tls_without_client_authentication_is_a_warning(fields, warns, caplog):
    security.check_exposure(TeacherServerConfig(**BEYOND, tls_cert="c", tls_key="k", **fields))
    assert ("does not authenticate clients" in caplog.text) == warns


# ---- tokens ----


def test_an_invalid_token_is_refused_as_missing_wrong_or_expired(start_sidecar, tmp_path):
    path = token_file(tmp_path, "# trainers", "", f"{SECRET}  # Ann", "old-token-of-bob 2020-01-31T12:00:00Z")
    sidecar = start_sidecar("--token-file", path)
    with client_of(sidecar, token=SECRET) as client:
        score(client)
    for token, message in (
        (None, "no token"),
        ("wrong-" + SECRET, "wrong token"),
        (SECRET[:-1], "wrong token"),
        ("old-token-of-bob", "expired token.*2020-01-31T12:00:00"),
    ):
        error = assert_fails_fast(sidecar, message, token=token)
        assert isinstance(error, UnauthenticatedError) and (token is None or token not in str(error))


def test_tokens_never_appear_in_logs_whatever_happens(start_sidecar, tmp_path):
    path = token_file(tmp_path, SECRET, "old-token-of-bob 2020-01-31")
    given = [SECRET, "guessed-by-mallory", "old-token-of-bob"]
    sidecar = start_sidecar("--token-file", path, "--log-level", "debug", "--engine-arg", "fail_on_token=63")
    for token in given:
        with client_of(sidecar, token=token) as client:
            try:
                score(client)
                client.score([SequenceToScore(np.array([1, 63], np.int32))])
            except TeacherError as e:
                assert token not in str(e)
    token_file(tmp_path, SECRET, "yet-another one that is malformed")
    with client_of(sidecar, token=SECRET) as client:
        score(client)
    assert sidecar.stop() == 0
    assert "Traceback" in sidecar.log and "line 2: expected TOKEN" in sidecar.log and "refused" in sidecar.log
    for secret in (*given, "yet-another"):
        assert secret not in sidecar.log
    config = TeacherServerConfig(engine="fake", model="m", token_file=path)
    assert SECRET not in repr(config) and SECRET not in repr(credentials.parse_tokens(SECRET.encode(), path))


def test_every_method_but_health_requires_the_token(start_sidecar, tmp_path):
    sidecar = start_sidecar("--token-file", token_file(tmp_path, SECRET))
    request = teacher_pb2.ScoreSequencesRequest(sequence_lengths=[2], token_ids=[1, 2])
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(sidecar.address) as channel:
        teacher, control = (
            teacher_pb2_grpc.TeacherServiceStub(channel),
            teacher_pb2_grpc.TeacherControlServiceStub(channel),
        )
        unknown = channel.unary_unary("/no.such.Service/Method")

        def ask_all(metadata):
            def list_services():
                stub = reflection_pb2_grpc.ServerReflectionStub(channel)
                return list(stub.ServerReflectionInfo(iter([listing]), timeout=60, metadata=metadata))

            calls = {
                "ScoreSequences": lambda: list(teacher.ScoreSequences(request, timeout=60, metadata=metadata)),
                "GetServerInfo": lambda: teacher.GetServerInfo(
                    teacher_pb2.GetServerInfoRequest(), timeout=60, metadata=metadata
                ),
                "Sleep": lambda: control.Sleep(teacher_pb2.SleepRequest(), timeout=60, metadata=metadata),
                "Wake": lambda: control.Wake(teacher_pb2.WakeRequest(), timeout=60, metadata=metadata),
                "reflection": list_services,
                "unknown": lambda: unknown(b"", timeout=60, metadata=metadata),
            }
            outcome = {}
            for name, call in calls.items():
                try:
                    call()
                    outcome[name] = "OK"
                except grpc.RpcError as e:
                    outcome[name] = e.code().name
                    if e.code() is grpc.StatusCode.UNAUTHENTICATED:
                        assert reason_of(e) == "UNAUTHENTICATED"
            return outcome

        for refused in (
            (),
            (("authorization", SECRET),),
            (("authorization", f"Basic {SECRET}"),),
            (("authorization", "Bearer "),),
            (("authorization", f"Bearer {SECRET}"), ("authorization", "Bearer x")),
        ):
            assert set(ask_all(refused).values()) == {"UNAUTHENTICATED"}, refused
        outcome = ask_all((("authorization", f"bearer  {SECRET}"),))  # RFC 9110: the scheme's case does not matter
        assert outcome.pop("unknown") == "UNIMPLEMENTED"
        assert "UNAUTHENTICATED" not in outcome.values()
        assert outcome["ScoreSequences"] == outcome["GetServerInfo"] == outcome["reflection"] == "OK"
        health = health_pb2_grpc.HealthStub(channel)
        check = health_pb2.HealthCheckRequest(service="")
        assert health.Check(check, timeout=60).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(check, timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def reason_of(error):
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    (packed,) = (d for d in status_pb2.Status.FromString(details).details if d.Is(info.DESCRIPTOR))
    packed.Unpack(info)
    return info.reason


def test_tokens_are_rotated_without_a_restart_and_without_a_failed_call(start_sidecar, tmp_path):
    path = token_file(tmp_path, "first")
    sidecar = start_sidecar("--token-file", path)
    own = tmp_path / "own"  # the client's file
    own.write_text("first\n")
    with client_of(sidecar, token=lambda: credentials.read_token(str(own))) as client:
        score(client)
        token_file(tmp_path, "first", "second")
        own.write_text("second\n")
        score(client)
        token_file(tmp_path, "second")
        score(client)  # the client still holds the first token: refused, it reads its file again
        token_file(tmp_path, "third")
        with pytest.raises(UnauthenticatedError, match="wrong token"):
            score(client)


def test_an_unusable_token_file_keeps_the_previous_tokens(start_sidecar, tmp_path):
    path = token_file(tmp_path, SECRET)
    sidecar = start_sidecar("--token-file", path)
    for damage in (lambda: token_file(tmp_path), lambda: os.unlink(path), lambda: token_file(tmp_path, "a b c")):
        damage()
        with client_of(sidecar, token=SECRET) as client:
            score(client)
    assert sidecar.log.count("the previous tokens are kept") == 3


def test_a_token_that_expires_in_mid_run_fails_the_next_call_at_once(start_sidecar, tmp_path):
    path = token_file(tmp_path, f"{SECRET} 2999-12-31")
    sidecar = start_sidecar("--token-file", path)
    with client_of(sidecar, token=SECRET) as client:
        score(client)
        token_file(tmp_path, f"{SECRET} {datetime.datetime.now(datetime.UTC).isoformat()}")
        begin = time.monotonic()
        with pytest.raises(UnauthenticatedError, match=f"{sidecar.address}.*expired token"):
            score(client)
        assert time.monotonic() - begin < FAST_S


def test_a_token_expires_on_time_although_its_file_does_not_change(tmp_path):
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=0.3)
    tokens = security.BearerTokens(token_file(tmp_path, f"{SECRET} {expires.isoformat()}"))
    while True:
        before = datetime.datetime.now(datetime.UTC)
        try:
            tokens.check(f"Bearer {SECRET}")
        except UnauthenticatedError as e:
            assert "expired token" in str(e) and datetime.datetime.now(datetime.UTC) >= expires
            break
        assert before < expires
        time.sleep(0.01)


def test_a_token_file_that_others_can_read_is_a_warning(tmp_path, caplog):
    path = token_file(tmp_path, SECRET)
    security.BearerTokens(path)
    assert "chmod" not in caplog.text
    os.chmod(path, 0o640)
    security.BearerTokens(path)
    assert f"chmod 600 {path}" in caplog.text


@pytest.mark.parametrize(
    "line, expires",
    [
        ("t", None),
        ("t 2030-01-31T12:00:00Z", "2030-01-31T12:00:00+00:00"),
        ("t\t2030-01-31T12:00:00+02:00 # why", "2030-01-31T10:00:00+00:00"),
        ("t 2030-01-31", "2030-01-31T00:00:00+00:00"),
    ],
)
def test_an_expiry_is_iso_8601_and_utc_unless_it_says_otherwise(line, expires):
    (token,) = credentials.parse_tokens(f"# c\n\n  {line}\r\n".encode(), "file")
    assert token.text == "t"
    assert token.expires is None if expires is None else token.expires == datetime.datetime.fromisoformat(expires)


@pytest.mark.parametrize("line", ["t tomorrow", "t 2030-01-31T12:00:00Z x", "schlüssel", "t 31.1.2030"])
def test_an_invalid_token_line_is_named_by_number_without_its_content(line):
    with pytest.raises(ValueError, match="token_file file, line 2") as caught:
        credentials.parse_tokens(f"good\n{line}\n".encode(), "file")
    assert line.split()[0] not in str(caught.value).split() and "good" not in str(caught.value)


def test_a_client_takes_the_first_token_that_has_not_expired(tmp_path):
    path = pathlib.Path(token_file(tmp_path, "old 2020-01-01", "new 2999-01-01", "newer"))
    assert credentials.read_token(str(path)) == "new"
    path.write_text("old 2020-01-01\n")
    with pytest.raises(ValueError, match="has expired"):
        credentials.read_token(str(path))


def test_why_closed_reports_tls_mistakes_only(start_sidecar, authority):
    plain, secure = start_sidecar(), start_sidecar(*authority.server_flags())
    assert credentials.why_closed(plain.address, tls=False) is None
    assert credentials.why_closed(plain.address, tls=True) is None
    assert credentials.why_closed(secure.address, tls=True) is None
    assert "speaks TLS" in credentials.why_closed(secure.address, tls=False)
    for unreachable in ("127.0.0.1:1", "unix:/no/such/socket", "no.such.host.invalid:1"):
        assert credentials.why_closed(unreachable, tls=False) is None


def test_server_certificate_returns_what_any_tls_client_sees(start_sidecar, authority):
    sidecar = start_sidecar(*authority.server_flags())
    seen = credentials.server_certificate(sidecar.address, ca=authority.ca)
    shown = ssl.get_server_certificate(("127.0.0.1", sidecar.port), ca_certs=authority.ca)
    text = subprocess.run(["openssl", "x509", "-noout", "-enddate"], input=shown, capture_output=True, text=True).stdout
    assert text.strip() == "notAfter=Jan  1 00:00:00 3000 GMT" and seen.expires == "3000-01-01T00:00:00+00:00"
    assert seen.subject == "127.0.0.1, localhost"
