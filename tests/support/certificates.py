"""Certificates for the tests' TLS servers and clients, from a CA of their own."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NAMES = ("127.0.0.1", "localhost")
_DAY = datetime.timedelta(days=1)
_NOW = datetime.datetime.now(datetime.timezone.utc)


@dataclass(frozen=True)
class Pair:
    """PEM files of a certificate and its key."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Certificates:
    """Files of a CA and of what it has signed."""

    ca: Path
    server: Pair
    client: Pair

    def params(self, client: bool = True) -> dict[str, str]:
        """The parameters of a spilling config; without `client`, of one that proves nothing."""
        proof = {
            "tls_cert_file": str(self.client.certificate),
            "tls_key_file": str(self.client.key),
        }
        return {"tls_ca_file": str(self.ca), **(proof if client else {})}


def make_certificates(
    directory: Path, names: Sequence[str] = NAMES, expired: bool = False
) -> Certificates:
    """Make a CA, and let it sign a server that has `names`, and a client.

    With `expired`, what it signs has been valid until a day ago.
    """
    directory.mkdir(parents=True, exist_ok=True)
    ca = _Authority(_NOW - 2 * _DAY if expired else _NOW)
    authority = directory / "ca.pem"
    authority.write_bytes(_pem(ca.certificate))
    return Certificates(
        authority,
        ca.sign(directory, "server", ExtendedKeyUsageOID.SERVER_AUTH, names),
        ca.sign(directory, "client", ExtendedKeyUsageOID.CLIENT_AUTH, []),
    )


class _Authority:
    def __init__(self, signing_at: datetime.datetime) -> None:
        self._signing_at = signing_at
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("CA of the tests")
        self._identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        self.certificate = (
            _unsigned(self._name, self._name, self._key.public_key(), _NOW)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(self._identifier, critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def sign(
        self, directory: Path, role: str, usage: x509.ObjectIdentifier, names: Sequence[str]
    ) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        # Python 3.13 and newer refuse a certificate without.
        authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self._identifier)
        builder = (
            _unsigned(_name(role), self._name, key.public_key(), self._signing_at)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(authority, critical=False)
        )
        if names:
            alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
            builder = builder.add_extension(alternatives, critical=False)
        pair = Pair(directory / f"{role}.pem", directory / f"{role}-key.pem")
        pair.certificate.write_bytes(_pem(builder.sign(self._key, hashes.SHA256())))
        pair.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return pair


def _unsigned(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, at: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - _DAY)
        .not_valid_after(at + _DAY)
    )


def _key_usage(**uses: bool) -> x509.KeyUsage:
    nothing = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return x509.KeyUsage(**{**nothing, **uses})


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
