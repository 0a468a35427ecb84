"""An authority of the test's own, and certificates that it signs."""

import datetime
import pathlib

import trustme

UTC = datetime.UTC


class Authority:
    """`ca` is the path of its PEM file."""

    def __init__(self, directory: pathlib.Path, name: str = "ca"):
        self._authority = trustme.CA(organization_name=name)
        self._directory = directory
        self._name = name
        self.ca = str(directory / f"{name}.pem")
        self._authority.cert_pem.write_to_path(self.ca)

    def pair(self, *names: str, file: str = "server", **dates) -> tuple[str, str]:
        """(certificate, key): paths; for localhost unless said otherwise. A second call replaces the files."""
        issued = self._authority.issue_cert(*(names or ("127.0.0.1", "localhost")), **dates)
        cert, key = (self._directory / f"{self._name}-{file}.{kind}" for kind in ("pem", "key"))
        for path, blobs in ((cert, issued.cert_chain_pems), (key, [issued.private_key_pem])):
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(b"".join(blob.bytes() for blob in blobs))
            temporary.replace(path)
        return str(cert), str(key)

    def server_flags(self) -> list[str]:
        """A server certificate, as flags of `jdistill teacher`."""
        cert, key = self.pair()
        return ["--tls-cert", cert, "--tls-key", key]


EXPIRED = {
    "not_before": datetime.datetime(2020, 1, 1, tzinfo=UTC),
    "not_after": datetime.datetime(2021, 1, 1, tzinfo=UTC),
}
