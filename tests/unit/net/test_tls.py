"""Who gets through a handshake, over real sockets on loopback."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from ckptd.client.pki import IssuedFiles, init_cluster, issue, make_leaf_certificate
from ckptd.core.identity import Role, load_ca
from ckptd.errors import ConfigError, NotAuthorized
from ckptd.net.tls import (
    check_peer,
    cipher_environment,
    client_context,
    needs_chacha,
    openssl_conf_text,
    server_context,
)

DEADLINE_S = 20.0
LOOPS: list[Callable[[], asyncio.AbstractEventLoop]] = [
    asyncio.new_event_loop,
    uvloop.new_event_loop,
]


@dataclass(frozen=True)
class Cluster:
    """A CA in a directory of its own, and what it issues."""

    directory: Path

    def issue(self, node_id: str, *roles: Role, now: datetime | None = None) -> IssuedFiles:
        return issue(self.directory, roles, node_id, now=now)

    def craft(self, node_id: str, *, cluster: str = "home", valid_to: datetime) -> IssuedFiles:
        """A worker's certificate that the CA signed although no command of ours would make it."""
        key = Ed25519PrivateKey.generate()
        ca_key = load_pem_private_key((self.directory / "ca.key").read_bytes(), None)
        assert isinstance(ca_key, Ed25519PrivateKey)
        certificate = make_leaf_certificate(
            cluster,
            {Role.WORKER},
            node_id,
            key.public_key(),
            ca=load_ca((self.directory / "ca.pem").read_bytes()),
            ca_key=ca_key,
            valid_to=valid_to,
        )
        files = IssuedFiles(
            ca=self.directory / "ca.pem",
            cert=self.directory / f"{node_id}.pem",
            key=self.directory / f"{node_id}.key",
        )
        files.cert.write_bytes(certificate.public_bytes(Encoding.PEM))
        files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return files


def make_cluster(directory: Path, name: str = "home") -> Cluster:
    init_cluster(directory, name)
    return Cluster(directory)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return make_cluster(tmp_path_factory.mktemp("pki") / "home")


@pytest.fixture(scope="module")
def pi1(home: Cluster) -> IssuedFiles:
    return home.issue("pi1", Role.WORKER)


@pytest.fixture(scope="module")
def laptop(home: Cluster) -> IssuedFiles:
    return home.issue("laptop", Role.CLIENT)


def server_side(files: IssuedFiles) -> ssl.SSLContext:
    return server_context(files.ca, files.cert, files.key)


def client_side(files: IssuedFiles) -> ssl.SSLContext:
    return client_context(files.ca, files.cert, files.key)


@dataclass
class Outcome:
    """What both ends of one connection saw: the exchanged word, or the error."""

    client_error: Exception | None = None
    server_error: Exception | None = None
    client_got: bytes = b""
    server_got: bytes = b""
    client_certificate: bytes = b""
    server_certificate: bytes = b""
    versions: set[str | None] = field(default_factory=set)
    ciphers: set[str] = field(default_factory=set)

    @property
    def refused_by_server(self) -> bool:
        return self.server_error is not None and not self.server_got and not self.client_got

    def note(self, connection: ssl.SSLSocket) -> None:
        cipher = connection.cipher()
        assert cipher is not None
        self.versions.add(connection.version())
        self.ciphers.add(cipher[0])


def serve_one(listener: socket.socket, context: ssl.SSLContext, outcome: Outcome) -> None:
    accepted, _ = listener.accept()
    accepted.settimeout(DEADLINE_S)
    try:
        with context.wrap_socket(accepted, server_side=True) as connection:
            outcome.client_certificate = connection.getpeercert(binary_form=True) or b""
            outcome.server_got = connection.recv(5)
            connection.sendall(b"there")
            outcome.note(connection)
    except (ssl.SSLError, OSError) as error:
        outcome.server_error = error
    finally:
        accepted.close()


def connect(server: ssl.SSLContext, client: ssl.SSLContext) -> Outcome:
    """One connection over loopback: "hello" one way, "there" the other."""
    outcome = Outcome()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)
        thread = threading.Thread(target=serve_one, args=(listener, server, outcome))
        thread.start()
        try:
            call(listener.getsockname()[1], client, outcome)
        finally:
            thread.join(DEADLINE_S)
    assert not thread.is_alive()
    return outcome


def call(port: int, context: ssl.SSLContext, outcome: Outcome) -> None:
    plain = socket.create_connection(("127.0.0.1", port), DEADLINE_S)
    try:
        with context.wrap_socket(plain) as connection:
            outcome.server_certificate = connection.getpeercert(binary_form=True) or b""
            connection.sendall(b"hello")
            outcome.client_got = connection.recv(5)
            outcome.note(connection)
    except (ssl.SSLError, OSError) as error:
        outcome.client_error = error
    finally:
        plain.close()


def test_a_client_and_a_node_of_the_cluster_talk(pi1: IssuedFiles, laptop: IssuedFiles) -> None:
    outcome = connect(server_side(pi1), client_side(laptop))
    assert (outcome.client_error, outcome.server_error) == (None, None)
    assert (outcome.server_got, outcome.client_got) == (b"hello", b"there")
    assert outcome.versions == {"TLSv1.3"}
    client = check_peer(outcome.client_certificate, cluster="home")
    assert (client.node_id, client.roles, client.is_node) == (
        "laptop",
        frozenset({Role.CLIENT}),
        False,
    )
    node = check_peer(outcome.server_certificate, cluster="home", expected_node_id="pi1")
    assert (node.node_id, node.roles, node.is_node) == ("pi1", frozenset({Role.WORKER}), True)


def test_no_certificate_is_refused(home: Cluster, pi1: IssuedFiles) -> None:
    anonymous = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    anonymous.check_hostname = False
    anonymous.load_verify_locations(home.directory / "ca.pem")
    outcome = connect(server_side(pi1), anonymous)
    assert outcome.refused_by_server
    assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in str(outcome.server_error)


def test_another_clusters_client_is_refused(tmp_path: Path, pi1: IssuedFiles) -> None:
    stranger = make_cluster(tmp_path / "other").issue("laptop", Role.CLIENT)
    insistent = client_side(stranger)
    insistent.verify_mode = ssl.CERT_NONE
    outcome = connect(server_side(pi1), insistent)
    assert outcome.refused_by_server
    assert "CERTIFICATE_VERIFY_FAILED" in str(outcome.server_error)


def test_another_clusters_node_is_refused(tmp_path: Path, laptop: IssuedFiles) -> None:
    stranger = make_cluster(tmp_path / "other").issue("pi1", Role.WORKER)
    lenient = server_side(stranger)
    lenient.verify_mode = ssl.CERT_NONE
    outcome = connect(lenient, client_side(laptop))
    assert "CERTIFICATE_VERIFY_FAILED" in str(outcome.client_error)
    assert outcome.server_got == b""


def test_an_expired_certificate_is_refused_on_both_sides(
    home: Cluster, pi1: IssuedFiles, laptop: IssuedFiles
) -> None:
    expired = home.craft("expired", valid_to=datetime(2021, 1, 1, tzinfo=UTC))
    as_client = connect(server_side(pi1), client_side(expired))
    assert as_client.refused_by_server
    assert "certificate has expired" in str(as_client.server_error)
    as_server = connect(server_side(expired), client_side(laptop))
    assert "certificate has expired" in str(as_server.client_error)
    assert as_server.server_got == b""


def test_a_certificate_made_by_a_machine_without_a_clock_is_good(
    home: Cluster, laptop: IssuedFiles
) -> None:
    issued = home.issue("no-clock", Role.WORKER, now=datetime(1970, 1, 1, tzinfo=UTC))
    outcome = connect(server_side(issued), client_side(laptop))
    assert outcome.client_got == b"there"


def test_a_stolen_client_key_cannot_play_a_node(home: Cluster, laptop: IssuedFiles) -> None:
    impostor = home.issue("pi9", Role.CLIENT)
    outcome = connect(server_side(impostor), client_side(laptop))
    assert "CERTIFICATE_VERIFY_FAILED" in str(outcome.client_error)
    with pytest.raises(NotAuthorized, match="not a node's"):
        check_peer(
            ssl.PEM_cert_to_DER_cert(impostor.cert.read_text()),
            cluster="home",
            expected_node_id="pi9",
        )


def test_another_node_that_answers_is_noticed(home: Cluster, laptop: IssuedFiles) -> None:
    outcome = connect(server_side(home.issue("pi2", Role.WORKER)), client_side(laptop))
    assert outcome.client_error is None
    with pytest.raises(NotAuthorized, match="meant to reach node pi1, but worker pi2"):
        check_peer(outcome.server_certificate, cluster="home", expected_node_id="pi1")
    assert check_peer(outcome.server_certificate, cluster="home").node_id == "pi2"


def test_a_certificate_of_our_ca_for_another_cluster_is_refused(
    home: Cluster, laptop: IssuedFiles
) -> None:
    away = home.craft("pi3", cluster="away", valid_to=datetime(2036, 1, 1, tzinfo=UTC))
    outcome = connect(server_side(away), client_side(laptop))
    with pytest.raises(NotAuthorized, match="'away', not 'home'"):
        check_peer(outcome.server_certificate, cluster="home", expected_node_id="pi3")


def test_a_peer_without_a_certificate_is_nobody() -> None:
    with pytest.raises(NotAuthorized, match="no certificate"):
        check_peer(b"", cluster="home")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_2:DeprecationWarning")
@pytest.mark.parametrize("old_side", ["client", "server"])
def test_tls_1_2_is_refused(pi1: IssuedFiles, laptop: IssuedFiles, old_side: str) -> None:
    server, client = server_side(pi1), client_side(laptop)
    old = client if old_side == "client" else server
    old.minimum_version = ssl.TLSVersion.TLSv1_2
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    outcome = connect(server, client)
    assert outcome.client_error is not None
    assert outcome.server_error is not None
    assert (outcome.server_got, outcome.client_got) == (b"", b"")


def test_clear_text_is_refused(pi1: IssuedFiles) -> None:
    outcome = Outcome()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)
        thread = threading.Thread(target=serve_one, args=(listener, server_side(pi1), outcome))
        thread.start()
        with socket.create_connection(listener.getsockname(), DEADLINE_S) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            thread.join(DEADLINE_S)
    assert outcome.refused_by_server


def test_no_session_is_resumed(pi1: IssuedFiles, laptop: IssuedFiles) -> None:
    server, client = server_side(pi1), client_side(laptop)
    session: ssl.SSLSession | None = None
    for _ in range(2):
        outcome = Outcome()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(DEADLINE_S)
            thread = threading.Thread(target=serve_one, args=(listener, server, outcome))
            thread.start()
            plain = socket.create_connection(listener.getsockname(), DEADLINE_S)
            with client.wrap_socket(plain, session=session) as connection:
                connection.sendall(b"hello")
                assert connection.recv(5) == b"there"
                assert not connection.session_reused
                session = connection.session
                assert session is not None
                assert not session.has_ticket
            thread.join(DEADLINE_S)
        # The full handshake carries the certificate every time.
        assert check_peer(outcome.client_certificate, cluster="home").node_id == "laptop"


@pytest.mark.parametrize("new_loop", LOOPS)
def test_asyncio_and_uvloop_connections_are_checked_alike(
    pi1: IssuedFiles,
    laptop: IssuedFiles,
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    callers: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("ssl_object")
        callers.append(check_peer(peer, cluster="home").node_id)
        writer.write(await reader.readexactly(5))
        await writer.drain()
        writer.close()

    async def talk() -> str:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server_side(pi1))
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_side(laptop))
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        peer = writer.get_extra_info("ssl_object")
        node = check_peer(peer, cluster="home", expected_node_id="pi1")
        writer.close()
        server.close()
        return node.node_id

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(asyncio.wait_for(talk(), DEADLINE_S)) == "pi1"
    assert callers == ["laptop"]


def test_a_ca_file_may_carry_a_comment(
    tmp_path: Path, pi1: IssuedFiles, laptop: IssuedFiles
) -> None:
    commented = tmp_path / "ca.pem"
    commented.write_bytes("The CA of Zoë's home\n".encode() + pi1.ca.read_bytes())
    outcome = connect(server_context(commented, pi1.cert, pi1.key), client_side(laptop))
    assert outcome.client_got == b"there"


def test_files_that_cannot_be_used_are_named_by_their_config_key(
    tmp_path: Path, pi1: IssuedFiles, laptop: IssuedFiles
) -> None:
    rubbish = tmp_path / "rubbish"
    rubbish.write_text("rubbish")
    encrypted = tmp_path / "encrypted.key"
    key = load_pem_private_key(pi1.key.read_bytes(), None)
    encrypted.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    missing = tmp_path / "missing"
    for ca, cert, key_file, config_key, reason in [
        (missing, pi1.cert, pi1.key, "tls.ca", "No such file"),
        (pi1.ca, missing, pi1.key, "tls.cert", "No such file"),
        (pi1.ca, pi1.cert, missing, "tls.key", "No such file"),
        (rubbish, pi1.cert, pi1.key, "tls.ca", "cannot be used"),
        (pi1.cert, pi1.cert, pi1.key, "tls.ca", "may not sign others"),
        (pi1.ca, rubbish, pi1.key, "tls.cert", "do not belong together"),
        (pi1.ca, pi1.cert, rubbish, "tls.cert", "do not belong together"),
        (pi1.ca, pi1.cert, laptop.key, "tls.cert", "do not belong together"),
        (pi1.ca, pi1.cert, encrypted, "tls.key", "is encrypted"),
    ]:
        for make in (server_context, client_context):
            with pytest.raises(ConfigError) as fault:
                make(ca, cert, key_file)
            assert (fault.value.key, reason in fault.value.reason) == (config_key, True), reason
            # `config check` opens none of these files and would find nothing wrong.
            assert fault.value.next == "ckptd doctor"


PI_4 = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\nmodel name\t: Cortex-A72\n"
PI_5 = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics\n"
X86 = "processor\t: 0\nflags\t\t: fpu vme sse2 aes avx\nbugs\t\t: spectre_v1\n"


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (PI_4, True),
        (PI_5, False),
        (X86, False),
        (X86.replace(" aes ", " "), True),
        (PI_5.replace(" aes ", " vaes "), True),
        (PI_5 + "\n" + PI_4, True),
        ("", False),
        ("processor\t: 0\nSerial\t\t: 10000000aes\n", False),
    ],
)
def test_a_cpu_without_aes_is_recognised(cpuinfo: str, expected: bool) -> None:
    assert needs_chacha(cpuinfo) is expected


CHILD = """
import socket, sys
from pathlib import Path
from ckptd.net.tls import client_context, server_context

side, ca, cert, key, port = sys.argv[1], *map(Path, sys.argv[2:5]), int(sys.argv[5])
if side == "server":
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    listener.settimeout(20)
    connection = server_context(ca, cert, key).wrap_socket(listener.accept()[0], server_side=True)
    assert connection.recv(5) == b"hello"
    connection.sendall(b"there")
else:
    plain = socket.create_connection(("127.0.0.1", port), 20)
    connection = client_context(ca, cert, key).wrap_socket(plain)
    connection.sendall(b"hello")
    assert connection.recv(5) == b"there"
print(connection.cipher()[0], flush=True)
"""


def start_child(
    side: str, files: IssuedFiles, port: int, openssl_conf: Path
) -> subprocess.Popen[str]:
    arguments = [side, str(files.ca), str(files.cert), str(files.key), str(port)]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        env={
            **os.environ,
            "OPENSSL_CONF": str(openssl_conf),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def chacha_conf(tmp_path: Path) -> Path:
    path = tmp_path / "openssl.cnf"
    path.write_text(openssl_conf_text())
    return path


def test_without_the_configuration_aes_is_negotiated(pi1: IssuedFiles, laptop: IssuedFiles) -> None:
    """What the two tests below would see if the configuration did nothing."""
    outcome = connect(server_side(pi1), client_side(laptop))
    assert outcome.ciphers == {"TLS_AES_256_GCM_SHA384"}


def test_a_server_with_the_configuration_negotiates_chacha(
    pi1: IssuedFiles, laptop: IssuedFiles, chacha_conf: Path
) -> None:
    outcome = Outcome()
    with start_child("server", pi1, 0, chacha_conf) as child:
        assert child.stdout is not None
        call(int(child.stdout.readline()), client_side(laptop), outcome)
        negotiated, _ = child.communicate(timeout=DEADLINE_S)
    assert outcome.ciphers == {"TLS_CHACHA20_POLY1305_SHA256"}
    assert negotiated.strip() == "TLS_CHACHA20_POLY1305_SHA256"


def test_a_client_with_the_configuration_negotiates_chacha(
    pi1: IssuedFiles, laptop: IssuedFiles, chacha_conf: Path
) -> None:
    outcome = Outcome()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)
        port = listener.getsockname()[1]
        with start_child("client", laptop, port, chacha_conf) as child:
            serve_one(listener, server_side(pi1), outcome)
            negotiated, _ = child.communicate(timeout=DEADLINE_S)
    assert outcome.server_error is None
    assert outcome.ciphers == {"TLS_CHACHA20_POLY1305_SHA256"}
    assert negotiated.strip() == "TLS_CHACHA20_POLY1305_SHA256"


def test_a_processor_without_aes_starts_with_another_openssl_config() -> None:
    environment = cipher_environment("Features : fp asimd crc32\n", {"HOME": "/root"})
    assert environment is not None
    assert environment["HOME"] == "/root"
    assert "CHACHA20" in Path(environment["OPENSSL_CONF"]).read_text()


def test_the_openssl_config_is_left_alone_where_it_is_not_needed_or_set_already() -> None:
    assert cipher_environment("Features : fp asimd aes crc32\n", {}) is None
    assert cipher_environment("Features : fp\n", {"OPENSSL_CONF": "/etc/mine"}) is None
