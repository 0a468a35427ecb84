"""An endpoint is one server: several behind one name or one balancer are refused, a restart is not."""

import asyncio
import concurrent.futures
import contextlib
import itertools
import socket

import grpc
import pytest

from jdistill.client import TeacherClient
from jdistill.client.identity import Identity, SeveralServersError
from jdistill.wire.channel import SERVER_OPTIONS
from jdistill.wire.endpoint import parse_endpoint
from jdistill.wire.types import ServerState
from tests.client.factories import check, sequences


class Balancer:
    """A gRPC proxy that sends each call to the next of its teachers."""

    def __init__(self, teachers):
        self.teachers = list(teachers)
        self._turn = itertools.count()
        self._channels = {teacher: grpc.insecure_channel(teacher.endpoint) for teacher in teachers}
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(8), options=SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers((self,))
        self.endpoint = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def service(self, details):
        """As grpc.GenericRpcHandler asks for it."""
        teacher = self.teachers[next(self._turn) % len(self.teachers)]
        make = grpc.unary_stream_rpc_method_handler
        call = self._channels[teacher].unary_stream(details.method)
        return make(lambda request, context: call(request, timeout=context.time_remaining()))

    def close(self):
        self._server.stop(None).wait()
        for channel in self._channels.values():
            channel.close()


@pytest.fixture
def balance():
    with contextlib.ExitStack() as stack:
        yield lambda *teachers: stack.enter_context(contextlib.closing(Balancer(teachers)))


CALLS = {
    "info": lambda client: client.info(),
    "score": lambda client: client.score(sequences(2)),
    "sleep": lambda client: client.sleep(),
    "wake": lambda client: client.wake(),
    "check_can_sleep": lambda client: client.check_can_sleep(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", [2, 5])
def test_servers_behind_a_balancer_are_refused_by_every_first_call(call, number, start_teacher, balance, connect):
    teachers = [start_teacher(can_sleep=True) for _ in range(number)]
    balancer = balance(*teachers)
    with pytest.raises(SeveralServersError, match=r"several servers.*give the address of each server") as refused:
        CALLS[call](connect([balancer.endpoint]))
    assert sum(teacher.instance_id in str(refused.value) for teacher in teachers) >= 2


def test_one_server_behind_a_proxy_is_fine_and_a_second_one_is_noticed_later(start_teacher, balance, connect):
    teachers = [start_teacher(can_sleep=True), start_teacher(can_sleep=True)]
    balancer = balance(*teachers)
    balancer.teachers = [teachers[0]]
    client = connect([balancer.endpoint])
    check(teachers[0], asked := sequences(3), client.score(asked))
    client.sleep()
    balancer.teachers = teachers
    with pytest.raises(SeveralServersError, match="several servers"):
        client.wake()


def test_an_endpoint_of_several_servers_is_refused_although_another_one_is_right(start_teacher, balance, connect):
    several = balance(start_teacher(), start_teacher())
    with pytest.raises(SeveralServersError, match="several servers"):
        connect([start_teacher().endpoint, several.endpoint]).info()


def on_ipv6(teacher, port):
    """Moves a teacher to the same port of the other loopback address."""
    teacher.stop()
    teacher.host, teacher.port = "[::1]", port
    return teacher.start()


@pytest.fixture
def both_addresses(monkeypatch):
    """localhost resolves to both loopback addresses, as it does on most machines."""
    resolve = socket.getaddrinfo

    def fake(host, *args, **kwargs):
        if host != "localhost":
            return resolve(host, *args, **kwargs)
        return [*resolve("127.0.0.1", *args, **kwargs), *resolve("::1", *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", fake)


def test_a_name_for_two_servers_is_refused(start_teacher, both_addresses, connect):
    first = start_teacher()
    second = on_ipv6(start_teacher(), first.port)
    with pytest.raises(SeveralServersError, match=r"the name stands for ipv4:.*ipv6:") as refused:
        connect([f"localhost:{first.port}"]).info()
    assert first.instance_id in str(refused.value) and second.instance_id in str(refused.value)
    for endpoint in (first.endpoint, second.endpoint):  # the remedy
        connect([endpoint]).info()


def test_a_name_for_two_addresses_of_one_server_is_fine(start_teacher, both_addresses, connect):
    teacher = start_teacher()
    connect([f"localhost:{teacher.port}"]).info()  # nothing listens at the other address
    teacher.server.add_insecure_port(f"[::1]:{teacher.port}")
    connect([f"localhost:{teacher.port}"]).info()


def test_one_server_under_two_endpoints_is_warned_of(start_teacher, connect, caplog):
    teacher = start_teacher()
    connect([f"127.0.0.1:{teacher.port}", f"localhost:{teacher.port}"]).info()
    assert f"127.0.0.1:{teacher.port} and localhost:{teacher.port} are the same server: give it once" in caplog.text
    caplog.clear()
    connect(teacher, start_teacher()).info()
    assert "same server" not in caplog.text


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ipv4:127.0.0.1:{}", "localhost:{}", "dns:///localhost:{}"])
def test_every_form_of_an_address_reaches_the_server(form, start_teacher, connect):
    teacher = start_teacher()
    check(teacher, asked := sequences(2), connect([form.format(teacher.port)]).score(asked))


def test_an_ipv6_address_reaches_the_server(start_teacher, connect):
    teacher = on_ipv6(start_teacher(), 0)
    for endpoint in (f"[::1]:{teacher.port}", f"ipv6:[::1]:{teacher.port}"):
        check(teacher, asked := sequences(2), connect([endpoint]).score(asked))


def test_a_restarted_server_is_not_taken_for_several(start_teacher):
    teacher = start_teacher(can_sleep=True)
    with TeacherClient([teacher.endpoint], deadline_s=20) as client:
        for _ in range(3):
            check(teacher, asked := sequences(2), client.score(asked))
            client.sleep()
            teacher.stop()
            teacher.set_state(ServerState.SERVING)
            teacher.start()
            client.wake()


@pytest.mark.parametrize(
    ("answers", "refused"),
    [
        (["a"] * 9, False),
        (["a", "a", "a", "a", "b", "b", "b", "b", "b"], False),  # a restart
        (["a", "b", "b", "b"], False),  # a restart during the check
        (["", "", ""], False),  # a server that has no id
        (["a", "a", "b", "a"], True),
        (["a", "b", "c", "d"], True),
        (["a", "a", "a", "a", "b", "b", "b", "b", "a"], True),  # one that was gone has come back
    ],
)
def test_which_answers_mean_several_servers(answers, refused):
    async def run():
        identity, rest = Identity(parse_endpoint("127.0.0.1:1")), iter(answers)

        async def ask():
            return next(rest)

        for answer in rest:
            await identity.check(answer, ask, None)

    if refused:
        with pytest.raises(SeveralServersError):
            asyncio.run(run())
    else:
        asyncio.run(run())
