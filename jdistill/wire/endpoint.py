"""The address of one server, checked before anything connects to it. Uses only the standard library."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Sequence
from typing import Any, NoReturn

_PREFIX = re.compile(r"dns:///|dns:|ipv4:|ipv6:")  # gRPC's, with one address


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """One server: a host and a port, or a Unix socket (no host, port 0)."""

    text: str  # as given
    target: str  # as gRPC takes it
    host: str
    port: int

    @property
    def is_name(self) -> bool:
        """Whether the host is a name, which may stand for several addresses."""
        return bool(self.host) and not _is_ip(self.host)


def parse_endpoint(text: Any, what: str = "endpoint") -> Endpoint:
    """Parses "host:port", "[IPv6 address]:port" or "unix:/path".

    Args:
        text: what a user gave.
        what: name of the option in error messages.

    Raises:
        ValueError: says what is wrong with it, and what was expected.

    >>> parse_endpoint("gpu7:50051").target
    'dns:///gpu7:50051'
    """

    def refuse(reason: str) -> NoReturn:
        raise ValueError(
            f'{what} {text!r}: {reason}; expected "host:port", "[IPv6 address]:port" or "unix:/path", without a scheme '
            "such as http://"
        )

    if not isinstance(text, str):
        refuse("it is no string")
    if not text or re.search(r"\s", text) or not text.isprintable():
        refuse("it is empty or contains spaces")
    if "," in text:
        refuse("one endpoint is one server, so that sleep and wake reach each of them: list them one by one")
    if text.startswith(("unix:", "unix-abstract:")):
        path = text.partition(":")[2]
        if not path.strip("/") or (path.startswith("//") and not path.startswith("///")):
            refuse("the path of the socket is missing")
        return Endpoint(text, text, "", 0)
    address = _PREFIX.sub("", text, count=1) if _PREFIX.match(text) else text
    if "/" in address:
        refuse("it has a scheme or a path")
    host, colon, port = address.rpartition(":")
    if address.startswith("["):
        host, closed, port = address[1:].partition("]")
        colon, port = port[:1], port[1:]
        if not closed or not _is_ip(host, version=6):
            refuse("no IPv6 address is in the brackets")
    elif ":" in host:
        refuse("an IPv6 address needs brackets")
    elif colon and not re.fullmatch(r"\w([\w.-]*\w)?\.?", host, re.ASCII):
        refuse("the host is missing" if not host else "this is no host name")
    elif re.fullmatch(r"[0-9.]+", host) and not _is_ip(host):
        refuse("the host is no IPv4 address")
    if colon != ":" or not port:
        refuse("the port is missing")
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        refuse("a port is a number from 1 to 65535")
    return Endpoint(text, target_of(host, int(port)), host, int(port))


def parse_endpoints(texts: Sequence[str], what: str = "endpoints") -> tuple[Endpoint, ...]:
    """Parses the endpoints of one teacher's replicas.

    Raises:
        ValueError: there is none, or one is malformed or listed twice.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f'{what} = {texts!r}, expected a list of addresses such as ["127.0.0.1:50051"]')
    endpoints = tuple(parse_endpoint(text, f"{what}:") for text in texts)
    if len({endpoint.target for endpoint in endpoints}) != len(endpoints):
        raise ValueError(f"{what} {list(texts)}: one is listed twice")
    return endpoints


def target_of(host: str, port: int) -> str:
    """The gRPC target of a name or of exactly one address."""
    if not _is_ip(host):
        return f"dns:///{host}:{port}"
    # The zone of a link-local address (fe80::1%eth0) is part of a URI here.
    return f"ipv6:[{host.replace('%', '%25')}]:{port}" if ":" in host else f"ipv4:{host}:{port}"


def _is_ip(host: str, version: int | None = None) -> bool:
    try:
        return ipaddress.ip_address(host).version in (version or 4, version or 6)
    except ValueError:
        return False
