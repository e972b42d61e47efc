"""Proxies and private certificate authorities: one rule for both clients of S3 and for MLflow."""

import datetime
import ipaddress
import os
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from faulty_s3 import KEYS, proxy

from ktray.data import filesystem
from ktray.errors import KtrayError
from ktray.storage import network, s3
from ktray.storage.store import Dir, Store
from ktray.tracking.mlflow_server import prepare

VARIABLES = (*network.CERTIFICATES, "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy")


@pytest.fixture
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """A certificate for 127.0.0.1 that it signed itself, and a server's context with it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a private authority")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("authority")
    (folder / "ca.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.pem", folder / "key.pem")
    return folder / "ca.pem", context


@pytest.fixture
def secure(s3_proxy, authority, environment):
    """The store of the tests behind TLS, with a certificate that no client knows."""
    with proxy(f"http://{s3_proxy.target}", authority[1]) as server:
        environment.setenv("AWS_ENDPOINT_URL", server.url.replace("http://", "https://"))
        yield server


def use(place):
    """Both clients: pyarrow writes and reads, boto3 lists and creates."""
    folder = Dir(place)
    folder.write("a", b"1")
    assert folder.read("a") == b"1"
    assert folder.names() == {"a": 1}
    Store(place).check_writable()


@pytest.mark.parametrize("name", network.CERTIFICATES)
def test_a_private_authority_holds_for_both_clients(secure, authority, environment, name):
    environment.setenv(name, str(authority[0]))
    use(f"s3://ktray-test/{name}")
    assert sum(secure.seen.values()) > 4


def test_an_unknown_authority_ends_at_once_and_says_what_to_set(secure, environment):
    with pytest.raises(KtrayError, match="AWS_CA_BUNDLE to a file with the certificates"):
        Store("s3://ktray-test/unknown").check_writable()
    with pytest.raises(OSError, match=r"(?i)certificate"):
        filesystem.read_bytes("s3://ktray-test/unknown/a")


def test_a_file_of_certificates_that_is_missing_is_named(secure, environment):
    environment.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    with pytest.raises(KtrayError, match=r"no file '/nowhere/ca.pem' \(REQUESTS_CA_BUNDLE\)"):
        Store("s3://ktray-test/missing").check_writable()


def test_a_proxy_holds_for_both_clients(s3_proxy, environment):
    with proxy(f"http://{s3_proxy.target}") as through:
        environment.setenv("AWS_ENDPOINT_URL", "http://store.invalid:9000")  # only the proxy knows this name
        environment.setenv("HTTP_PROXY", through.url)
        use("s3://ktray-test/through")
        assert sum(through.seen.values()) > 4


def test_hosts_that_no_proxy_serves(s3_proxy, environment):
    environment.setenv("AWS_ENDPOINT_URL", f"http://{s3_proxy.target}")
    environment.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    environment.setenv("NO_PROXY", "127.0.0.1")
    use("s3://ktray-test/direct")


def test_a_proxy_of_another_kind_is_refused(environment):
    environment.setenv("AWS_ENDPOINT_URL", "https://store.invalid")
    environment.setenv("HTTPS_PROXY", "socks5://user:secret@127.0.0.1:9")
    with pytest.raises(KtrayError, match="HTTPS_PROXY is a socks5 proxy") as error:
        Store("s3://ktray-test/socks").check_writable()
    assert "secret" not in str(error.value)


def test_certificates_alone_do_not_hinder_the_look_up_of_a_region(environment, authority):
    """Some Python distributions always set SSL_CERT_FILE."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        environment.delenv(name, raising=False)
    environment.setenv("SSL_CERT_FILE", str(authority[0]))
    environment.setattr(s3.pafs, "resolve_s3_region", lambda bucket: "eu-north-1")
    assert s3.S3("ktray-test").region == "eu-north-1"


def test_amazons_region_cannot_be_looked_up_through_a_proxy(environment):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        environment.delenv(name, raising=False)
    environment.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(KtrayError, match="set AWS_REGION"):
        filesystem.locate("s3://ktray-test/x")


@pytest.mark.parametrize(
    ("given", "exempt"),
    [
        ({}, {}),
        ({"HTTPS_PROXY": "http://p:1"}, {"NO_PROXY": "localhost,127.0.0.1,::1"}),
        ({"http_proxy": "p:1", "no_proxy": "a.b, localhost"}, {"no_proxy": "a.b,localhost,127.0.0.1,::1"}),
    ],
)
def test_this_machine_is_reached_without_a_proxy(given, exempt):
    found = dict(given)
    network.keep_loopback(found)
    assert {name: found[name] for name in exempt} == exempt
    assert (found == given) == (not exempt)


def test_mlflow_trusts_the_same_authority(environment, authority):
    environment.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", "")  # so that what `prepare` sets ends with this test
    del os.environ["MLFLOW_TRACKING_SERVER_CERT_PATH"]
    environment.setenv("AWS_CA_BUNDLE", str(authority[0]))
    environment.setenv("MLFLOW_TRACKING_INSECURE_TLS", "")
    prepare(5)
    assert os.environ["MLFLOW_TRACKING_SERVER_CERT_PATH"] == str(authority[0])
