"""TLS and token files, checked when they are read: gRPC would report each mistake much later, as UNAVAILABLE.

Uses only the standard library (`ssl`), to keep the client small. No message contains a token.
"""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
import re
import socket
import ssl
from typing import Any

import grpc

from jdistill.wire.endpoint import parse_endpoint

DIAGNOSIS_TIMEOUT_S = 3.0

_VALIDITY_CODES = (9, 10)  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
# Pattern of gRPC's description of a failed handshake, remedy.
_HANDSHAKE_REMEDIES = (
    (
        r"wrong.version.number",
        "this server speaks plain text: leave out the credentials (tls_ca), or start it with --tls-cert and --tls-key",
    ),
    (r"certificate has expired", "its certificate has expired: replace the file given to its --tls-cert"),
    (r"not yet valid", "its certificate is not valid yet: is the clock right on both machines?"),
    (
        r"hostname verification|peer name",
        "its certificate is not for the host in this address: use a name or address that the certificate holds",
    ),
    (
        r"certificate.verify.failed|unknown.ca|self.signed|issuer",
        "its certificate is not signed by the authority in tls_ca: pass the file of the authority that signed it",
    ),
    (r"handshake failed|ssl_error|certificate", "do the TLS credentials belong to this server?"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Certificate:
    """Subject and expiry of a certificate, for logs and `jdistill probe`."""

    subject: str
    expires: str  # ISO 8601, UTC


@dataclasses.dataclass(frozen=True, slots=True, repr=False)  # no repr: it would show the token
class Token:
    """One bearer token; `expires` is None if it never expires."""

    text: str
    expires: datetime.datetime | None


def channel_credentials(
    *, ca: str | None = None, cert: str | None = None, key: str | None = None
) -> grpc.ChannelCredentials | None:
    """Makes the `credentials` of a TeacherClient; None (plain text) if no file is given.

    Args:
        ca: PEM file of the authorities that may have signed the server's certificate (for a public authority:
            the system's file, e.g. /etc/ssl/certs/ca-certificates.crt).
        cert, key: PEM files of the client's own certificate and private key, for a server that requires one (mTLS).

    Raises:
        ValueError: a file is missing, unreadable or unusable; names it and the remedy.
    """
    if ca is None and cert is None and key is None:
        return None
    if ca is None:
        raise ValueError(
            "tls_cert and tls_key are for TLS: tls_ca, the authority of the server's certificate, is missing"
        )
    if (cert is None) != (key is None):
        missing, given = ("tls_key", "tls_cert") if key is None else ("tls_cert", "tls_key")
        raise ValueError(f"{missing} is missing: it belongs to {given}")
    roots = read_authorities(ca, "tls_ca")
    if cert is None or key is None:
        return grpc.ssl_channel_credentials(roots)
    chain, private_key, _ = read_pair(cert, key, server=False)
    return grpc.ssl_channel_credentials(roots, private_key, chain)


def read_authorities(path: str, name: str) -> bytes:
    """Reads a PEM file of trusted certificates; messages call it by the option's `name`.

    Raises:
        ValueError: the file is unreadable or contains no certificate.
    """
    data = _read(path, name)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError, ValueError) as e:
        raise ValueError(f"{name} {path}: it contains no certificate in PEM format ({_reason(e)})") from None
    return data


def read_pair(cert: str, key: str, *, server: bool) -> tuple[bytes, bytes, Certificate]:
    """Reads a certificate and its private key; returns (certificate chain, private key, facts).

    Args:
        server: whether a server presents the certificate; otherwise a client does.

    Raises:
        ValueError: a file is unreadable, not PEM or encrypted, they are not a pair, or the certificate is expired or
            not valid yet; names the remedy.
    """
    chain, private_key = _read(cert, "tls_cert"), _read(key, "tls_key")
    try:
        facts = _inspect(cert, key, server)
    except ssl.SSLCertVerificationError as e:
        raise ValueError(
            f"tls_cert {cert}: {e.verify_message}: get a new certificate for this key, or check the machine's clock"
        ) from None
    except ssl.SSLError as e:
        if e.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(
                f"tls_key {key} is not the key of the certificate in tls_cert {cert}: the first certificate of that "
                "file must be the one that was made for this key"
            ) from None
        raise ValueError(
            f"tls_cert {cert} and tls_key {key}: not a certificate and its private key in PEM format ({_reason(e)})"
        ) from None
    return chain, private_key, facts


def read_token(path: str) -> str:
    """Returns the first unexpired token of a token file; pass `lambda: read_token(path)` to TeacherClient.

    Raises:
        ValueError: the file is unreadable, contains no token, or all of its tokens have expired.
    """
    tokens = read_tokens(path)
    now = datetime.datetime.now(datetime.UTC)
    for token in tokens:
        if token.expires is None or token.expires > now:
            return token.text
    raise ValueError(f"token_file {path}: the token in it has expired: get a new one")


def read_tokens(path: str) -> list[Token]:
    """Reads all tokens of a file, see `parse_tokens`; raises ValueError if the file is unreadable or malformed."""
    return parse_tokens(_read(path, "token_file"), path)


def parse_tokens(data: bytes, path: str) -> list[Token]:
    """Parses a token file: one token per line, optionally followed by its expiry in ISO 8601 (default zone: UTC).

    Empty lines are skipped; a # at the start of a word begins a comment.

    Raises:
        ValueError: a line is malformed, or there is no token; names file and line, never the token.
    """
    tokens = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), start=1):
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if not words:
            continue
        if len(words) > 2 or not re.fullmatch(r"[\x21-\x7e]+", words[0]):
            raise ValueError(
                f"token_file {path}, line {number}: expected TOKEN or TOKEN EXPIRY, e.g. 2030-01-31T12:00:00Z; a token "
                "is printable ASCII without spaces (openssl rand -hex 32)"
            )
        expires = None
        if len(words) == 2:
            try:
                expires = datetime.datetime.fromisoformat(words[1])
            except ValueError:
                raise ValueError(
                    f"token_file {path}, line {number}: the second word is not a time in ISO 8601, such as "
                    "2030-01-31T12:00:00Z"
                ) from None
            if expires.tzinfo is None:
                expires = expires.replace(tzinfo=datetime.UTC)
        tokens.append(Token(words[0], expires))
    if not tokens:
        raise ValueError(f"token_file {path}: it contains no token; expected one per line (openssl rand -hex 32)")
    return tokens


def handshake_remedy(details: str) -> str | None:
    """Returns the remedy for a failed call whose `details` mention TLS; None if they do not."""
    for pattern, remedy in _HANDSHAKE_REMEDIES:
        if re.search(pattern, details, re.IGNORECASE):
            return remedy
    return None


def why_closed(endpoint: str, *, tls: bool) -> str | None:
    """Diagnoses a server that accepts connections and closes them at once; returns the remedy, None if unknown.

    gRPC reports plain text sent to a TLS server, and a missing client certificate, exactly like a server that is
    shutting down ("Socket closed"), which is worth a retry. So this starts a TLS handshake and looks at the answer.

    Args:
        endpoint: of the server; a Unix socket is not diagnosed.
        tls: whether the failed connection was TLS.
    """
    address = parse_endpoint(endpoint)
    if not address.host:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing secret is sent: only the protocol is probed
    context.set_alpn_protocols(["h2"])
    shook = refused = False
    try:
        with (
            socket.create_connection((address.host, address.port), timeout=DIAGNOSIS_TIMEOUT_S) as plain,
            context.wrap_socket(plain) as secure,
        ):
            shook = True
            if tls:
                # A TLS 1.3 server rejects a missing certificate only after the handshake: with an alert or, like
                # gRPC's, by closing the connection where it would otherwise send its first HTTP/2 frame.
                refused = secure.recv(1) == b""
    except ssl.SSLError as e:
        refused = "ALERT" in (e.reason or "")
    except OSError:
        pass
    if tls and refused:
        return (
            "this server wants a client certificate that its --tls-client-ca has signed (tls_cert, tls_key): none was "
            "given, it is signed by another authority, or it has expired"
        )
    if not tls and (shook or refused):
        return "this server speaks TLS: pass the file of its authority (tls_ca)"
    return None


def server_certificate(
    endpoint: str, *, ca: str, cert: str | None = None, key: str | None = None, timeout_s: float = DIAGNOSIS_TIMEOUT_S
) -> Certificate:
    """Returns the certificate that a TLS server presents; raises OSError (ssl.SSLError is one) unless it is valid."""
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    if cert is not None:
        context.load_cert_chain(cert, key)
    address = parse_endpoint(endpoint)
    with (
        socket.create_connection((address.host, address.port), timeout=timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=address.host) as secure,
    ):
        return _facts(secure.getpeercert())


def _inspect(cert: str, key: str, server: bool) -> Certificate:
    """Reads a certificate by a handshake with itself in memory: `ssl` only parses a peer's certificate."""
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    theirs.check_hostname = False
    theirs.verify_mode = ssl.CERT_NONE
    for context in (ours, theirs):
        context.load_cert_chain(cert, key, password=_no_password)
    verifier = theirs if server else ours
    verifier.verify_mode = ssl.CERT_REQUIRED
    verifier.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # trust the certificate itself; only its dates matter
    verifier.load_verify_locations(cafile=cert)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    end_s = ours.wrap_bio(to_server, to_client, server_side=True)
    end_c = theirs.wrap_bio(to_client, to_server)
    for _ in range(4):  # a TLS 1.3 handshake takes two rounds
        for end in (end_c, end_s):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError as e:
                if e.verify_code in _VALIDITY_CODES:
                    raise
                return Certificate("not known", "not known")  # gRPC and the peer will report what is wrong with it
    return _facts((end_c if server else end_s).getpeercert())


def _no_password() -> str:
    raise ValueError(
        "tls_key is encrypted, and a server cannot ask for its password: decrypt it (openssl pkey -in KEY -out PLAIN) "
        "into a file that only this user can read"
    )


def _facts(peer: Any) -> Certificate:
    names = [value for group in peer.get("subject", ()) for key, value in group if key == "commonName"]
    names += [value for _, value in peer.get("subjectAltName", ())]
    expires = datetime.datetime.fromtimestamp(ssl.cert_time_to_seconds(peer["notAfter"]), datetime.UTC)
    return Certificate(", ".join(dict.fromkeys(names)) or "no name", expires.isoformat())


def _read(path: str, name: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as e:
        raise ValueError(f"{name} {path}: cannot be read ({e.strerror})") from None


def _reason(error: Exception) -> str:
    words = re.sub(r"\s*\(_?ssl\.c:\d+\)|\[SSL\]\s*", "", str(error))
    return words.strip().lower().replace("_", " ")
