"""Certificates for tests: an authority, what it signed, and what it should not be taken for."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import trustme

from splitlearn.wire import pem
from splitlearn.wire.channel import Credentials

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Issued:
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path

    def settings(self) -> dict[str, str]:
        """As in a section `tls` of config.yaml."""
        return {"certificate": str(self.certificate), "key": str(self.key)}


class Authority:
    """One that signs certificates into `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._own = trustme.CA()
        self.certificate = folder / f"{name}.pem"
        self._own.cert_pem.write_to_path(str(self.certificate))

    def issue(self, *names: str, expired: bool = False) -> Issued:
        """A certificate for these names, of today or of the day before yesterday alone."""
        now = datetime.now(UTC)
        days: dict[str, Any] = {"not_before": now - 3 * DAY, "not_after": now - 2 * DAY} if expired else {}
        made = self._own.issue_cert(*names, **days)
        stem = f"{self._name}-{names[0]}-{'expired' if expired else 'good'}".replace("@", "-")
        issued = Issued(self._folder / f"{stem}.pem", self._folder / f"{stem}.key")
        issued.certificate.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        made.private_key_pem.write_to_path(str(issued.key))
        return issued

    def credentials(self, own: Issued | None = None, token: str | None = None) -> Credentials:
        """Those of a client that trusts this authority."""
        certificate, key = pem.pair("", own.certificate, own.key) or (None, None) if own else (None, None)
        return Credentials(self.certificate.read_bytes(), certificate, key, token=token)
