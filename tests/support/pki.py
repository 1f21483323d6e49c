"""Certificates for tests: authorities and the certificates that they sign."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trustme

from splitlearn.wire import pem
from splitlearn.wire.channel import Credentials

DAY = timedelta(days=1)


@dataclass(frozen=True)
class CertificatePair:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path

    def settings(self) -> dict[str, str]:
        """The section `tls` of config.yaml for this pair."""
        return {"certificate": str(self.certificate), "key": str(self.key)}


class Authority:
    """An authority that writes its certificates to `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._own = trustme.CA()
        self.certificate = folder / f"{name}.pem"
        self._own.cert_pem.write_to_path(str(self.certificate))

    def issue(self, *names: str, expired: bool = False) -> CertificatePair:
        """A certificate for these names. An `expired` one ended two days ago."""
        now = datetime.now(UTC)
        days: dict[str, Any] = {"not_before": now - 3 * DAY, "not_after": now - 2 * DAY} if expired else {}
        made = self._own.issue_cert(*names, **days)
        stem = f"{self._name}-{names[0]}-{'expired' if expired else 'good'}".replace("@", "-")
        issued = CertificatePair(self._folder / f"{stem}.pem", self._folder / f"{stem}.key")
        issued.certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        made.private_key_pem.write_to_path(str(issued.key))
        return issued

    def credentials(self, own: CertificatePair | None = None, token: str | None = None) -> Credentials:
        """The credentials of a client that trusts this authority."""
        certificate, key = pem.pair("", own.certificate, own.key) or (None, None) if own else (None, None)
        return Credentials(self.certificate.read_bytes(), certificate, key, token=token)
