"""A federation's keys and certificates work in TLS and in Flower, are private, and are never overwritten."""

from __future__ import annotations

import ssl
import stat
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from certificates import main
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes


def make(*words: str | Path) -> str:
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 0, done.output
    return done.output


def refused(*words: str | Path) -> str:
    done = CliRunner().invoke(main, list(map(str, words)))
    assert done.exit_code == 1, done.output
    assert done.output.startswith("Error: ")
    return done.output


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "keys"
    make("authority", folder)
    make("server", folder, "--name", "fl.example.org", "--name", "192.0.2.10", "--days", "90")
    return folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shakes_hands(folder: Path, name: str, authority: Path | None = None) -> None:
    """Do a TLS handshake of a client that trusts the authority with the server, in memory."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    client.load_verify_locations(authority or folder / "ca.crt")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue


@pytest.mark.parametrize("name", ["fl.example.org", "192.0.2.10", "localhost", "127.0.0.1"])
def test_the_server_is_trusted_by_each_of_its_names_and_by_its_own_superexec(keys: Path, name: str) -> None:
    shakes_hands(keys, name)


def test_another_name_and_another_authority_are_not_trusted(keys: Path, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"not valid for 'evil\.org'"):
        shakes_hands(keys, "evil.org")
    make("authority", tmp_path / "other")
    with pytest.raises(ssl.SSLCertVerificationError):
        shakes_hands(keys, "localhost", tmp_path / "other" / "ca.crt")


def test_flower_reads_a_nodes_keys_and_they_belong_together(keys: Path) -> None:
    make("node", keys, "site-1")
    private = load_ssh_private_key((keys / "nodes" / "site-1").read_bytes(), None)  # as flower-supernode
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(private.curve, ec.SECP384R1)
    assert try_load_public_key(keys / "nodes" / "site-1.pub") == public_key_to_bytes(private.public_key())


def test_private_files_are_their_owners_alone(keys: Path) -> None:
    make("node", keys, "site-1")
    make("secret", keys)
    for name in ("ca.key", "server.key", "nodes/site-1", "superexec.secret"):
        assert mode(keys / name) == 0o600, name
    assert (mode(keys), mode(keys / "nodes")) == (0o700, 0o700)


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    for command, *words in (["authority"], ["node", "site-1"], ["secret"]):
        assert "mode 750): chmod 700" in refused(command, tmp_path, *words)
    assert contents(tmp_path) == {}


def test_nothing_is_overwritten_and_nothing_is_half_made(keys: Path) -> None:
    make("node", keys, "site-1")
    make("secret", keys)
    before = contents(keys)
    for command, *words in (["authority"], ["server", "--name", "x"], ["node", "site-1"], ["secret"]):
        assert "is there already, and nothing is overwritten" in refused(command, keys, *words)
    assert contents(keys) == before
    (keys / "ca.key").rename(keys.parent / "ca.key")  # kept elsewhere, as the recipe says
    assert "ca.crt is there already" in refused("authority", keys)
    assert not (keys / "ca.key").exists()
    assert "cannot read" in refused("server", keys, "--renew")


def test_a_renewed_certificate_is_of_the_same_key_and_names_and_expires_later(keys: Path) -> None:
    before = x509.load_pem_x509_certificate((keys / "server.crt").read_bytes())
    key = (keys / "server.key").read_bytes()
    (keys / "server.crt.new").write_text("of a renewal that was killed")
    make("server", keys, "--renew", "--days", "200")
    after = x509.load_pem_x509_certificate((keys / "server.crt").read_bytes())
    assert (keys / "server.key").read_bytes() == key
    assert after.public_key() == before.public_key()
    assert after.serial_number != before.serial_number
    assert after.not_valid_after_utc - before.not_valid_after_utc > timedelta(days=109)
    shakes_hands(keys, "fl.example.org")
    make("server", keys, "--renew", "--name", "new.example.org")
    shakes_hands(keys, "new.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        shakes_hands(keys, "fl.example.org")


def test_a_certificate_that_expires_soon_is_told_by_the_exit_code(keys: Path) -> None:
    assert "server.crt  expires " in make("show", keys)
    make("server", keys, "--renew", "--days", "20")
    assert "a certificate expires in 19 days" in CliRunner().invoke(main, ["show", str(keys)]).output
    assert CliRunner().invoke(main, ["show", str(keys)]).exit_code == 1
    assert "has no certificate" in CliRunner().invoke(main, ["show", str(keys / "nodes")]).output


def test_the_server_never_outlives_its_authority(tmp_path: Path) -> None:
    make("authority", tmp_path / "keys", "--days", "10")
    assert "the authority expires before that" in refused("server", tmp_path / "keys", "--name", "x")
    make("server", tmp_path / "keys", "--name", "x", "--days", "9")
    found = x509.load_pem_x509_certificate((tmp_path / "keys" / "server.crt").read_bytes())
    assert found.not_valid_before_utc < datetime.now(timezone.utc)


@pytest.mark.parametrize("name", ["a:8000", "-x", "999.1.1.1", "", "a b", "http://x"])
def test_what_is_no_name_is_refused(keys: Path, name: str) -> None:
    assert "expected a DNS name or an IP address" in refused("server", keys, "--renew", "--name", name)


def test_a_server_needs_a_name_and_a_node_a_plain_one(keys: Path, tmp_path: Path) -> None:
    make("authority", tmp_path / "other")
    assert "give the names by which sites reach" in refused("server", tmp_path / "other")
    assert "expected letters, digits" in refused("node", keys, "../site")
    assert "cannot read" in refused("server", tmp_path / "none", "--name", "x")
