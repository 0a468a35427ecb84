"""What an endpoint may look like; the targets are tried on gRPC servers in tests/client."""

import pytest

from jdistill import cli, config
from jdistill.client import TeacherClient
from jdistill.wire.endpoint import parse_endpoint

RIGHT = {
    "127.0.0.1:50051": "ipv4:127.0.0.1:50051",
    "ipv4:127.0.0.1:50051": "ipv4:127.0.0.1:50051",
    "[::1]:50051": "ipv6:[::1]:50051",
    "ipv6:[::1]:50051": "ipv6:[::1]:50051",
    "[fe80::1%eth0]:1": "ipv6:[fe80::1%25eth0]:1",
    "localhost:65535": "dns:///localhost:65535",
    "teacher-0.teacher.default.svc.cluster.local.:50051": "dns:///teacher-0.teacher.default.svc.cluster.local.:50051",
    "my_host:1": "dns:///my_host:1",
    "xds:50051": "dns:///xds:50051",  # a host of this name, not a scheme
    "dns:///gpu7:50051": "dns:///gpu7:50051",
    "dns:gpu7:50051": "dns:///gpu7:50051",
    "unix:/run/teacher.sock": "unix:/run/teacher.sock",
    "unix:///run/teacher.sock": "unix:///run/teacher.sock",
    "unix:relative.sock": "unix:relative.sock",
    "unix-abstract:teacher": "unix-abstract:teacher",
}
WRONG = {
    "": "empty",
    " ": "spaces",
    "gpu7:50051 ": "spaces",
    "gpu7 :50051": "spaces",
    "gpu7:50051\n": "spaces",
    "gpu7:50051,gpu8:50051": "one endpoint is one server",
    "ipv4:10.0.0.1:1,10.0.0.2:1": "one endpoint is one server",
    "http://gpu7:50051": "scheme",
    "grpc://gpu7:50051": "scheme",
    "xds:///teacher": "scheme",
    "dns://8.8.8.8/gpu7:50051": "scheme",
    "gpu7:50051/": "path",
    "gpu7:50051/v1": "path",
    "gpu7": "port is missing",
    "gpu7:": "port is missing",
    "[::1]": "port is missing",
    "[::1]50051": "port is missing",
    ":50051": "host is missing",
    "::1:50051": "brackets",
    "::1": "brackets",
    "ipv6:::1:50051": "brackets",
    "gpu7:50051:50052": "brackets",
    "[gpu7]:50051": "no IPv6",
    "[127.0.0.1]:50051": "no IPv6",
    "[::1:50051": "no IPv6",
    "gpu7:0": "1 to 65535",
    "gpu7:70000": "1 to 65535",
    "gpu7:-1": "1 to 65535",
    "gpu7:+1": "1 to 65535",
    "gpu7:http": "1 to 65535",
    "gpu7:\u0661": "1 to 65535",  # a digit, but not an ASCII one
    "10.0.0:50051": "no IPv4",
    "10.0.0.256:50051": "no IPv4",
    "gpu 7:1": "spaces",
    "-gpu7:1": "no host name",
    "unix:": "path of the socket",
    "unix://": "path of the socket",
    "unix://host/path": "path of the socket",
}


@pytest.mark.parametrize(("text", "target"), RIGHT.items())
def test_an_address_becomes_one_grpc_target(text, target):
    endpoint = parse_endpoint(text)
    assert (endpoint.text, endpoint.target) == (text, target)


@pytest.mark.parametrize(("text", "reason"), WRONG.items())
def test_everyone_who_takes_an_address_refuses_a_malformed_one(text, reason, tmp_path, capsys):
    expected = 'expected "host:port"'
    with pytest.raises(ValueError, match=reason) as refused:
        TeacherClient([text])
    assert expected in str(refused.value) and repr(text) in str(refused.value)
    for section in ({"endpoints": [text]}, {"several": {"math": [text]}}):
        with pytest.raises(config.ConfigError, match=reason):
            config.parse(config.TeacherSection, section)
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": 0, "token_ids": [1, 2]}\n')
    score = ["score", f"--teacher={text}", "--input", str(source), "--output", str(tmp_path / "out.jsonl")]
    for argv in (["probe", "--", text], score):
        assert cli.main(argv) == 2
        assert expected in capsys.readouterr().err
