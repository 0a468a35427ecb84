"""TLS and token files, checked when they are read: gRPC itself says UNAVAILABLE to every mistake in them, much later.

Standard library only (`ssl`), so that the client stays small. No message names a token.
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

DIAGNOSIS_TIMEOUT_S = 3.0

_VALIDITY_CODES = (9, 10)  # OpenSSL's X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED
# What gRPC says of a failed handshake, and what to do.
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
        "its certificate is not signed by the authority in tls_ca: give the authority's file, of this very server",
    ),
    (r"handshake failed|ssl_error|certificate", "are the TLS credentials those of this server?"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Certificate:
    """What people want to know of a certificate."""

    subject: str
    expires: str  # ISO 8601, UTC


@dataclasses.dataclass(frozen=True, slots=True, repr=False)  # no repr: it would show the token
class Token:
    """One bearer token; `expires` is None if it never does."""

    text: str
    expires: datetime.datetime | None


def channel_credentials(
    *, ca: str | None = None, cert: str | None = None, key: str | None = None
) -> grpc.ChannelCredentials | None:
    """What TeacherClient takes as `credentials`; None, which is plain text, if nothing is given.

    Args:
        ca: PEM file of the authorities that may have signed the server's certificate (for a public authority:
            the system's file, e.g. /etc/ssl/certs/ca-certificates.crt).
        cert, key: PEM files of our own certificate and its private key, for a server that asks for one (mTLS).

    Raises:
        ValueError: a file cannot be read or used, or one is missing; says which and what to do.
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
    """The bytes of a PEM file of certificates that are trusted; `name` is the option's, for messages.

    Raises:
        ValueError: unreadable, or no certificate in it.
    """
    data = _read(path, name)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=data.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError, ValueError) as e:
        raise ValueError(f"{name} {path}: no certificate in PEM form is in it ({_reason(e)})") from None
    return data


def read_pair(cert: str, key: str, *, server: bool) -> tuple[bytes, bytes, Certificate]:
    """(certificate chain, private key, facts) of two PEM files that belong together and are valid now.

    Args:
        server: whether a server shows it, else a client.

    Raises:
        ValueError: unreadable, no PEM, encrypted, not a pair, expired or not valid yet; says what to do.
    """
    chain, private_key = _read(cert, "tls_cert"), _read(key, "tls_key")
    try:
        facts = _inspect(cert, key, server)
    except ssl.SSLCertVerificationError as e:
        raise ValueError(
            f"tls_cert {cert}: {e.verify_message}: get a new certificate for this key, or see to the machine's clock"
        ) from None
    except ssl.SSLError as e:
        if e.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(
                f"tls_key {key} is not the key of the certificate in tls_cert {cert}: the first certificate of that "
                "file must be the one that was made for this key"
            ) from None
        raise ValueError(
            f"tls_cert {cert} and tls_key {key}: not a certificate and its private key in PEM form ({_reason(e)})"
        ) from None
    return chain, private_key, facts


def read_token(path: str) -> str:
    """The first token of a token file that has not expired; give TeacherClient `lambda: read_token(path)`.

    Raises:
        ValueError: unreadable, no token in it, or all have expired.
    """
    tokens = read_tokens(path)
    now = datetime.datetime.now(datetime.UTC)
    for token in tokens:
        if token.expires is None or token.expires > now:
            return token.text
    raise ValueError(f"token_file {path}: the token in it has expired: get a new one")


def read_tokens(path: str) -> list[Token]:
    """All tokens of a file, see `parse_tokens`. Raises ValueError if it cannot be read or used."""
    return parse_tokens(_read(path, "token_file"), path)


def parse_tokens(data: bytes, path: str) -> list[Token]:
    """The tokens of a file: one a line, then its expiry in ISO 8601 (UTC unless it says otherwise) if it has one.

    Empty lines and what follows a # at the beginning of a word are comments.

    Raises:
        ValueError: names file and line, never the token.
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
                    f"token_file {path}, line {number}: the second word is no time in ISO 8601, such as "
                    "2030-01-31T12:00:00Z"
                ) from None
            if expires.tzinfo is None:
                expires = expires.replace(tzinfo=datetime.UTC)
        tokens.append(Token(words[0], expires))
    if not tokens:
        raise ValueError(f"token_file {path}: no token in it; expected one a line (openssl rand -hex 32)")
    return tokens


def handshake_remedy(details: str) -> str | None:
    """What to do about a failed call whose `details` speak of TLS; None if they do not."""
    for pattern, remedy in _HANDSHAKE_REMEDIES:
        if re.search(pattern, details, re.IGNORECASE):
            return remedy
    return None


def why_closed(endpoint: str, *, tls: bool) -> str | None:
    """What is wrong with a server that takes connections and closes them at once, and what to do; None if unknown.

    Plain text to a TLS server, and no client certificate to one that wants one, look the same to gRPC as a server that
    is just ending ("Socket closed"), which is worth a retry. So we say hello to it in TLS, and look at what it answers.

    Args:
        endpoint: "host:port"; anything else is not looked at.
        tls: whether the failed connection was TLS.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or host.startswith("unix"):
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # we ask what it speaks, and tell it nothing
    context.set_alpn_protocols(["h2"])
    shook = refused = False
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout=DIAGNOSIS_TIMEOUT_S) as plain,
            context.wrap_socket(plain) as secure,
        ):
            shook = True
            if tls:
                # In TLS 1.3 a server says only after the handshake that it wanted a certificate: by an alert, or, as
                # gRPC's does, by hanging up where another one would begin to speak HTTP/2.
                refused = secure.recv(1) == b""
    except ssl.SSLError as e:
        refused = "ALERT" in (e.reason or "")
    except OSError:
        pass
    if tls and refused:
        return (
            "this server wants a client certificate that its --tls-client-ca has signed (tls_cert, tls_key): none was "
            "given, or not such a one, or it has expired"
        )
    if not tls and (shook or refused):
        return "this server speaks TLS: give its authority's file (tls_ca)"
    return None


def server_certificate(
    endpoint: str, *, ca: str, cert: str | None = None, key: str | None = None, timeout_s: float = DIAGNOSIS_TIMEOUT_S
) -> Certificate:
    """The certificate that a TLS server shows. Raises OSError (ssl.SSLError is one) if it shows none that is valid."""
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    if cert is not None:
        context.load_cert_chain(cert, key)
    host, _, port = endpoint.rpartition(":")
    host = host.strip("[]")
    with (
        socket.create_connection((host, int(port)), timeout=timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        return _facts(secure.getpeercert())


def _inspect(cert: str, key: str, server: bool) -> Certificate:
    """Shakes hands with itself in memory: the standard library reads no certificate but a peer's."""
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
    for _ in range(4):  # flights of TLS 1.3: two, and one to spare each
        for end in (end_c, end_s):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError as e:
                if e.verify_code in _VALIDITY_CODES:
                    raise
                return Certificate("not known", "not known")  # what gRPC and the peer think of it, they will say
    return _facts((end_c if server else end_s).getpeercert())


def _no_password() -> str:
    raise ValueError(
        "tls_key is encrypted, and nobody is there to type its password: decrypt it (openssl pkey -in KEY -out PLAIN) "
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
