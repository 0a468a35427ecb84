"""Refuses callers without a valid certificate or bearer token, and unsafe listening addresses. Never logs a token.

Certificates and tokens are read again when their files change, so that a run of weeks outlives both: the certificate
is looked up at each handshake, the tokens at each call.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import ipaddress
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health

from jdistill.config import ConfigError, TeacherServerConfig
from jdistill.wire import credentials
from jdistill.wire.errors import UnauthenticatedError
from jdistill.wire.status import to_status

logger = logging.getLogger(__name__)

OPEN_TO_ALL = (f"/{health.SERVICE_NAME}/",)  # probes of Kubernetes and load balancers carry no token
EXPIRES_SOON_S = 14 * 86400.0


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches `host`; a name other than localhost may resolve to anything."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(config: TeacherServerConfig) -> None:
    """Refuses a configuration that exposes the teacher or its traffic, unless `insecure` allows it.

    Raises:
        ConfigError: names what is missing, and the alternatives.
    """
    if config.tls_client_ca is not None and config.tls_cert is None:
        raise ConfigError("tls_client_ca is for TLS: give --tls-cert and --tls-key too")
    if (config.tls_cert is None) != (config.tls_key is None):
        missing, given = ("tls_key", "tls_cert") if config.tls_key is None else ("tls_cert", "tls_key")
        raise ConfigError(f"{missing} is missing: {given} needs it; give both or none")
    if is_loopback(config.host):
        return
    if config.tls_cert is not None:
        if config.token_file is None and config.tls_client_ca is None and not config.insecure:
            logger.warning(
                "any client that reaches %s can use this teacher: TLS alone does not authenticate clients; give "
                "--token-file or --tls-client-ca, or --insecure if that is intended",
                config.host,
            )
        return
    if not config.insecure:
        risk = "the tokens could be read on the way" if config.token_file else "any client could use this teacher"
        raise ConfigError(
            f"host {config.host}: beyond loopback {risk}, because nothing is encrypted. Give --tls-cert and --tls-key "
            "(and --token-file), or keep --host 127.0.0.1 and use a tunnel (ssh -L), or give --insecure in a network "
            "that you trust"
        )


class _Files:
    """Detects changes of files. A stat takes 2 microseconds, a call 200."""

    def __init__(self, paths: Sequence[str]):
        self._paths = paths
        self._seen = self._look()

    def changed(self) -> bool:
        """Returns whether a file has changed since the last call."""
        seen, self._seen = self._seen, self._look()
        return seen != self._seen

    def _look(self) -> list[tuple[int, int, int] | None]:
        result: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                found = os.stat(path)
            except OSError:
                result.append(None)
            else:
                result.append((found.st_mtime_ns, found.st_size, found.st_ino))
        return result


class ServerTls:
    """This server's certificate and accepted client authorities; `credentials` follow changes of the files.

    Raises:
        ConfigError: a file cannot be read or used; names it and the remedy.
    """

    def __init__(self, cert: str, key: str, client_ca: str | None):
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._files = _Files([cert, key] + ([] if client_ca is None else [client_ca]))
        try:
            first = self._load()
        except ValueError as e:
            raise ConfigError(str(e)) from None
        self.credentials = grpc.dynamic_ssl_server_credentials(first, self._renew, client_ca is not None)

    def _load(self) -> grpc.ServerCertificateConfiguration:
        chain, key, facts = credentials.read_pair(self._cert, self._key, server=True)
        roots = None if self._client_ca is None else credentials.read_authorities(self._client_ca, "tls_client_ca")
        left = datetime.datetime.fromisoformat(facts.expires) - datetime.datetime.now(datetime.UTC)
        soon = left.total_seconds() < EXPIRES_SOON_S
        logger.log(
            logging.WARNING if soon else logging.INFO,
            "certificate of %s, valid until %s%s",
            facts.subject,
            facts.expires,
            ": replace the files in time; no restart is needed" if soon else "",
        )
        return grpc.ssl_server_certificate_configuration([(key, chain)], roots)

    def _renew(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC in its own thread at each handshake; None keeps the current certificate."""
        if not self._files.changed():
            return None
        try:
            return self._load()
        except Exception as e:  # e.g. between the two writes of a new pair: keep the old one
            logger.error("the new certificate on disk cannot be used, the previous one is kept: %s", e)
            return None


class BearerTokens:
    """The tokens of a file, read again when it changes.

    An unreadable change (or one that leaves no token) is logged and the previous tokens stay valid: a half-written file
    must not end a run. To revoke all access, stop the sidecar.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(self, path: str):
        self._path = path
        self._files = _Files([path])
        self._tokens: list[credentials.Token] = []
        try:
            self._read()
        except ValueError as e:
            raise ConfigError(str(e)) from None

    def check(self, authorization: str | None) -> None:
        """Checks the value of the metadata "authorization".

        Raises:
            UnauthenticatedError: the token is missing, unknown or expired.
        """
        if self._files.changed():
            try:
                self._read()
            except (ValueError, OSError) as e:
                logger.error("the previous tokens are kept: %s", e)
        scheme, _, given = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise UnauthenticatedError(
                "no token: this teacher requires the metadata 'authorization: Bearer TOKEN' (--token-file of probe and "
                "score, token= of TeacherClient)"
            )
        # Digests have one length whatever the token's, and all are compared: the time reveals nothing.
        digest = hashlib.sha256(given.strip().encode()).digest()
        found = [t for t in self._tokens if hmac.compare_digest(digest, hashlib.sha256(t.text.encode()).digest())]
        if not found:
            raise UnauthenticatedError("wrong token: this teacher does not accept it, or no longer does")
        now = datetime.datetime.now(datetime.UTC)
        if not any(token.expires is None or token.expires > now for token in found):
            latest = max(token.expires for token in found if token.expires is not None)
            raise UnauthenticatedError(f"expired token: it was valid until {latest.isoformat()}")

    def _read(self) -> None:
        tokens = credentials.read_tokens(self._path)
        if os.stat(self._path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            logger.warning(
                "token_file %s can be read by other users than its owner: chmod 600 %s", self._path, self._path
            )
        now = datetime.datetime.now(datetime.UTC)
        num_expired = sum(token.expires is not None and token.expires <= now for token in tokens)
        self._tokens = tokens
        logger.info("%d tokens, %d of them expired", len(tokens), num_expired)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls without a valid token with UNAUTHENTICATED before a handler sees them; health needs no token.

    Args:
        on_refusal: called with the full name of the method ("/package.Service/Method").
    """

    def __init__(self, tokens: BearerTokens, on_refusal: Callable[[str], None] = lambda method: None):
        self._tokens = tokens
        self._on_refusal = on_refusal

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """See grpc.aio.ServerInterceptor."""
        method = handler_call_details.method
        if method.startswith(OPEN_TO_ALL):
            return await continuation(handler_call_details)
        metadata: Sequence[tuple[str, Any]] = handler_call_details.invocation_metadata or ()
        given = [value for key, value in metadata if key == "authorization"]
        try:
            self._tokens.check(given[0] if len(given) == 1 else None)
        except UnauthenticatedError as e:
            refusal = e
        else:
            return await continuation(handler_call_details)

        async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> None:
            self._on_refusal(method)
            logger.warning("refused %s of %s: %s", method, context.peer(), refusal, extra={"reason": refusal.reason})
            await context.abort(*to_status(refusal))

        # A stream handler fits every kind of method: nothing is read, and only the status is sent.
        return grpc.stream_stream_rpc_method_handler(refuse)
