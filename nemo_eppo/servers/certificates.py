"""Mutual TLS between the jobs of a run: who holds the run's certificate is one of its servers or clients.

`create` makes a folder of three PEM files: `ca.pem` (who is trusted), `cert.pem` and `key.pem` (who this process is).
All jobs of a run use the same ones; a server refuses everybody else before it parses anything.
"""

import datetime
import os
import ssl
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nemo_eppo.config import ConfigError
from nemo_eppo.files import replacing

NAME = "nemo-eppo"
"""The host name in certificates: all jobs of a run are one party, wherever they run."""
_LIFETIME = datetime.timedelta(days=3650)


class Certificates(NamedTuple):
    """The three PEM files of a folder."""

    ca: Path
    cert: Path
    key: Path

    @classmethod
    def of(cls, folder: Path) -> "Certificates":
        """Return the files of a folder that are valid and whose key nobody else can read.

        Raises:
            ConfigError: one is missing, does not fit the others, or the key is open to other users.
        """
        files = cls(*(folder / f"{name}.pem" for name in cls._fields))
        expected = "expected ca.pem, cert.pem and key.pem, as `nemo-eppo certificates FOLDER` makes them"
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ConfigError(f"certificates = {folder}: no {', '.join(missing)}; {expected}")
        if (mode := files.key.stat().st_mode & 0o777) & 0o077:
            raise ConfigError(f"certificates = {folder}: key.pem has mode {mode:o}, expected 600")
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(files.ca)
            context.load_cert_chain(files.cert, files.key)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(f"certificates = {folder}: {error}; {expected}") from None
        return files


def create(folder: Path) -> Certificates:
    """Return the certificates in `folder`, which is made with new ones if it does not exist.

    Raises:
        ConfigError: the folder exists and holds something else.
    """
    if not folder.exists():
        with replacing(folder) as temporary:
            temporary.mkdir(parents=True, mode=0o700)
            for name, content in _new().items():
                descriptor = os.open(temporary / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(content)
    return Certificates.of(folder)


def _new() -> dict[str, bytes]:
    """Make an authority, whose key is forgotten at once, and the one certificate that it signs."""
    authority, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    now = datetime.datetime.now(datetime.UTC)

    def signed(common_name: str, public: ec.EllipticCurvePublicKey, is_authority: bool) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{NAME} run")]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))  # clocks of nodes differ
            .not_valid_after(now + _LIFETIME)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )

    ca = signed(f"{NAME} run", authority.public_key(), True).sign(authority, hashes.SHA256())
    cert = (
        signed(NAME, key.public_key(), False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(authority, hashes.SHA256())
    )
    return {
        "ca.pem": ca.public_bytes(Encoding.PEM),
        "cert.pem": cert.public_bytes(Encoding.PEM),
        "key.pem": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    }
