"""Keys and certificates of a federation: its authority, the server's certificate, and a key for each site.

    python deploy/certificates.py authority keys
    python deploy/certificates.py server keys --name fl.example.org --name 192.0.2.10
    python deploy/certificates.py node keys site-1
    python deploy/certificates.py secret keys
    python deploy/certificates.py show keys

Private files can be read by their owner alone (0600, in a folder of 0700), and nothing is overwritten; `server --renew`
makes a new certificate for the server's key. All keys are on the curve P-384, which Flower asks of nodes.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import stat
from datetime import datetime, timedelta, timezone
from pathlib import Path

import click
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_KEY, AUTHORITY = "ca.key", "ca.crt"
SERVER_KEY, SERVER = "server.key", "server.crt"
SECRET = "superexec.secret"
HERE = ("localhost", "127.0.0.1")
"""The SuperLink's own SuperExec reaches it by these: without them its runs wait for ever."""
CLOCKS_DIFFER = timedelta(minutes=5)
DAYS_TO_RENEW = 30

folder_argument = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Make the keys and certificates of a federation."""


@main.command()
@folder_argument
@click.option("--days", default=3650, show_default=True, type=click.IntRange(min=1), help="Until it expires.")
def authority(folder: Path, days: int) -> None:
    """Make the authority that signs: FOLDER/ca.key, which stays here, and ca.crt, which everybody gets."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedmerge federation")])
    builder = _builder(name, name, key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    certificate = builder.sign(key, hashes.SHA384())
    _private_folder(folder)
    _require_new(folder / AUTHORITY_KEY, folder / AUTHORITY)
    _write(folder / AUTHORITY_KEY, _private_pem(key))
    _write(folder / AUTHORITY, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


@main.command()
@folder_argument
@click.option("--name", "names", multiple=True, help="DNS name or IP address by which sites reach it; several may be.")
@click.option("--days", default=365, show_default=True, type=click.IntRange(min=1), help="Until it expires.")
@click.option(
    "--renew", is_flag=True, help="A new certificate for the same key; the same names, unless --name is given."
)
def server(folder: Path, names: tuple[str, ...], days: int, renew: bool) -> None:
    """Make the server's key and certificate: FOLDER/server.key and server.crt."""
    authority_key = _read_key(folder / AUTHORITY_KEY)
    issuer = _read_certificate(folder / AUTHORITY)
    expires = datetime.now(timezone.utc) + timedelta(days=days)
    if expires > issuer.not_valid_after_utc:
        raise click.ClickException(
            f"the authority expires before that, at {issuer.not_valid_after_utc:%F}: fewer --days"
        )
    if renew:
        key = _read_key(folder / SERVER_KEY)
        found = _names(_read_certificate(folder / SERVER))
    else:
        key, found = ec.generate_private_key(ec.SECP384R1()), None
    if not names and found is None:
        raise click.ClickException("give the names by which sites reach the server: --name fl.example.org")
    all_names = dict.fromkeys((*names, *HERE))
    alternative = found if found is not None and not names else x509.SubjectAlternativeName(map(_name, all_names))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedmerge server")])
    builder = _builder(subject, issuer.subject, key.public_key(), days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(alternative, critical=False)
    builder = builder.add_extension(_signed_by(issuer), critical=False)
    content = builder.sign(authority_key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
    if renew:
        fresh = folder / f"{SERVER}.new"
        fresh.unlink(missing_ok=True)  # of a renewal that was killed
        _write(fresh, content, 0o644)
        fresh.replace(folder / SERVER)  # whole: a server that starts now reads the old one or the new one
    else:
        _require_new(folder / SERVER_KEY, folder / SERVER)
        _write(folder / SERVER_KEY, _private_pem(key))
        _write(folder / SERVER, content, 0o644)


@main.command()
@folder_argument
@click.argument("name")
def node(folder: Path, name: str) -> None:
    """Make a site's key: FOLDER/nodes/NAME, which the site alone gets, and NAME.pub, which the server registers."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise click.ClickException(f"expected letters, digits, - and _ as a node's name, got {name!r}")
    key = ec.generate_private_key(ec.SECP384R1())
    _private_folder(folder)
    _private_folder(folder / "nodes")
    _require_new(folder / "nodes" / name, folder / "nodes" / f"{name}.pub")
    _write(
        folder / "nodes" / name,
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        ),
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(folder / "nodes" / f"{name}.pub", public + f" {name}\n".encode(), 0o644)


@main.command()
@folder_argument
def secret(folder: Path) -> None:
    """Make the secret that a SuperLink and its SuperExec share: FOLDER/superexec.secret (containers alone need it)."""
    _private_folder(folder)
    _require_new(folder / SECRET)
    _write(folder / SECRET, secrets.token_hex(32).encode())


@main.command()
@folder_argument
def show(folder: Path) -> None:
    """Say what FOLDER holds and when it expires; the exit code is 1 if that is in less than 30 days."""
    left = []
    for file in (AUTHORITY, SERVER):
        if (folder / file).exists():
            certificate = _read_certificate(folder / file)
            left.append((certificate.not_valid_after_utc - datetime.now(timezone.utc)).days)
            names = ", ".join(str(name.value) for name in _names(certificate))
            click.echo(f"{file:<12}expires {certificate.not_valid_after_utc:%F}, in {left[-1]} days  {names}".rstrip())
    nodes = sorted(path.stem for path in (folder / "nodes").glob("*.pub"))
    click.echo(f"{'nodes':<12}{', '.join(nodes) or 'none'}")
    if not left:
        raise click.ClickException(f"{folder} has no certificate: make them with 'authority' and 'server'")
    if min(left) < DAYS_TO_RENEW:
        raise click.ClickException(
            f"a certificate expires in {min(left)} days: python {__file__} server {folder} --renew"
        )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _signed_by(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    if not re.fullmatch(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*", text) or re.fullmatch(r"[\d.]+", text):
        raise click.ClickException(f"expected a DNS name or an IP address, without a port, got {text!r}")
    return x509.DNSName(text)


def _names(certificate: x509.Certificate) -> x509.SubjectAlternativeName:
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return x509.SubjectAlternativeName([])


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(_read(path), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise click.ClickException(f"{path}: expected a key on an elliptic curve, got {type(key).__name__}")
    return key


def _read_certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(_read(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise click.ClickException(f"cannot read {path}: {error.strerror}; make it first") from error


def _private_folder(folder: Path) -> None:
    """Make a folder that its owner alone can enter, or refuse one that others can."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"cannot make the folder {folder}: {error.strerror}") from error
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & 0o077:
        raise click.ClickException(f"others can enter {folder} (mode {mode:o}): chmod 700 {folder}")


def _require_new(*paths: Path) -> None:
    """Refuse to begin where one of the files is there: a key without its certificate would be left behind."""
    for path in paths:
        if path.exists():
            raise click.ClickException(f"{path} is there already, and nothing is overwritten: move it away")


def _write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write a new file, which has its mode from the first moment on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    click.echo(f"wrote {path}")


if __name__ == "__main__":
    main()
