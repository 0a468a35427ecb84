"""A port is kept between one gRPC server and the next."""

import concurrent.futures
import contextlib
import socket
import sys

import grpc
import pytest

from jdistill.sidecar.port import Port, address
from jdistill.wire.channel import SERVER_OPTIONS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the port is not kept")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_no_other_socket_gets_the_port_before_the_next_server_listens(host):
    with contextlib.closing(Port(host, 0)) as port:
        first = port.number
        for _ in range(2):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", first))
            server = grpc.server(concurrent.futures.ThreadPoolExecutor(1), options=SERVER_OPTIONS)
            port.bind(server, None)
            server.start()
            assert port.number == first
            with grpc.insecure_channel(address(host, first)) as channel:
                grpc.channel_ready_future(channel).result(timeout=60)
            server.stop(None).wait()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of before may linger
        other.bind(("127.0.0.1", first))  # given up with close()
        other.listen()
