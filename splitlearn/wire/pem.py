"""Reads certificates and keys from PEM files and checks them, since gRPC would not say what is wrong.

Raises InputError that names the setting, the file and what would be right. No message has a key's content.
"""

import ssl
from pathlib import Path

from splitlearn.errors import InputError


def authorities(setting: str, path: Path | None) -> bytes | None:
    """The certificates of the authorities in `path`; None for None."""
    if path is None:
        return None
    content = _read(setting, path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise InputError(setting, str(path), "a PEM file of certificates (-----BEGIN CERTIFICATE-----)") from error
    return content


def pair(section: str, certificate: Path | None, key: Path | None) -> tuple[bytes, bytes] | None:
    """A certificate (with its chain) and its private key, from the settings `section`.certificate and .key."""
    if certificate is None or key is None:
        return None
    found = _read(f"{section}.certificate", certificate), _read(f"{section}.key", key)
    try:
        # Without a password of our own, OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        wanted = f"the unencrypted PEM private key of the PEM certificate {certificate}"
        raise InputError(f"{section}.key", str(key), wanted) from error
    return found


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(setting, str(path), f"a readable file ({error.strerror})") from error
