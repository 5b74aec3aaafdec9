"""Who is let in over TLS, and how fast and clearly others are told that they are not."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvpool.channels.base import ChannelError
from kvpool.channels.tcp import TcpChannel
from kvpool.channels.tcp_server import TcpDataServer
from kvpool.channels.tls import TlsConfig
from kvpool.core.errors import BadArgument, Reason
from tests.channels.certificates import client_tls, server_tls
from tests.channels.source_made import HarmfulProxy, MadeSource

DEADLINE_S = 60.0
Serve = Callable[[TlsConfig | None], TcpDataServer]


@pytest.fixture
def serve(source: MadeSource) -> Iterator[Serve]:
    with contextlib.ExitStack() as stack:

        def start(config: TlsConfig | None) -> TcpDataServer:
            server = TcpDataServer(source.segment.data, source.grants, "127.0.0.1", 0, tls_config=config)
            stack.callback(server.close)
            return server

        yield start


def _channel(source: MadeSource, address: str, config: TlsConfig | None) -> TcpChannel:
    """A channel that does as it is told, whatever was offered."""
    host, port = address.rsplit(":", 1)
    return TcpChannel(host, int(port), source.token, tls_config=config)


def _refused(source: MadeSource, address: str, config: TlsConfig | None) -> ChannelError:
    with contextlib.closing(_channel(source, address, config)) as channel, pytest.raises(ChannelError) as caught:
        channel.probe(deadline_s=DEADLINE_S)
    assert caught.value.hint, "it does not say what to do"
    assert caught.value.reason is not Reason.DEADLINE, "it took until the deadline"
    return caught.value


def test_the_offer_says_whether_it_is_encrypted(source: MadeSource, serve: Serve) -> None:
    for config, client in ((None, None), (server_tls(), client_tls())):
        offer = {**serve(config).offer_parameters, "token": source.token.hex()}
        assert (offer.get("tls") == "1") == (config is not None)
        TcpChannel.open(offer, tls_config=client).close()
        with pytest.raises(BadArgument) as caught:
            TcpChannel.open(offer, tls_config=client_tls() if client is None else None)
        assert caught.value.hint


def test_plain_client_to_a_tls_source(source: MadeSource, serve: Serve) -> None:
    error = _refused(source, serve(server_tls()).address, None)
    assert error.reason is Reason.UNAUTHENTICATED and "TLS" in str(error)


def test_tls_client_to_a_plain_source(source: MadeSource, serve: Serve) -> None:
    error = _refused(source, serve(None).address, client_tls())
    assert error.reason is Reason.UNAUTHENTICATED and "TLS" in str(error)


def test_a_source_that_others_vouch_for(source: MadeSource, serve: Serve) -> None:
    error = _refused(source, serve(server_tls(ca="theirs")).address, client_tls())
    assert error.reason is Reason.UNAUTHENTICATED and "verify failed" in str(error)


def test_a_source_with_another_name(source: MadeSource, serve: Serve) -> None:
    address = serve(server_tls(names="DNS:node.example")).address
    assert _refused(source, address, client_tls()).reason is Reason.UNAUTHENTICATED
    with contextlib.closing(_channel(source, address, client_tls(server_name="node.example"))) as channel:
        channel.probe(deadline_s=DEADLINE_S)


@pytest.mark.parametrize("own", [None, "theirs"])
def test_clients_have_to_prove_themselves(source: MadeSource, serve: Serve, own: str | None) -> None:
    address = serve(server_tls(verify_clients=True)).address
    assert _refused(source, address, client_tls(own=own)).reason is Reason.UNAUTHENTICATED
    with contextlib.closing(_channel(source, address, client_tls(own="ours"))) as channel:
        channel.probe(deadline_s=DEADLINE_S)


def test_clients_need_no_certificate_unless_asked(source: MadeSource, serve: Serve) -> None:
    with contextlib.closing(_channel(source, serve(server_tls()).address, client_tls())) as channel:
        channel.probe(deadline_s=DEADLINE_S)


def test_old_versions_are_refused(source: MadeSource, serve: Serve) -> None:
    host, port = serve(server_tls()).address.rsplit(":", 1)
    context = client_tls().client_context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((host, int(port))) as sock, pytest.raises(ssl.SSLError):
        context.wrap_socket(sock, server_hostname=host)


def test_nothing_passes_in_the_clear(source: MadeSource, serve: Serve) -> None:
    keys, data = source.store(4)
    lease, blocks = source.lease(keys)
    proxy = HarmfulProxy(serve(server_tls()).address)
    proxy.record = bytearray()
    with contextlib.closing(proxy), contextlib.closing(_channel(source, proxy.address, client_tls())) as channel:
        out = np.zeros_like(data)
        assert channel.read(lease, blocks, out, deadline_s=DEADLINE_S).all()
        reservation, slots = source.reserve(source.random_blocks(4)[0])
        channel.write(reservation, slots, data, deadline_s=DEADLINE_S)
        assert len(proxy.record) > 2 * data.nbytes
        assert source.token not in proxy.record
        for row in data:
            assert row[1000:1032].tobytes() not in proxy.record


@pytest.mark.parametrize(
    "spoil",
    [
        {"cert": None}, {"key": None}, {"cert": Path("nowhere.pem")}, {"ca": Path("nowhere.pem")},
        {"ca": None, "verify_clients": True},
    ],
)  # fmt: skip
def test_bad_server_files_are_named(spoil: dict[str, object]) -> None:
    with pytest.raises(BadArgument) as caught:
        dataclasses.replace(server_tls(), **spoil).server_context()
    assert caught.value.hint


def test_bad_client_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    for config in (TlsConfig(ca=broken), dataclasses.replace(client_tls(own="ours"), key=None)):
        with pytest.raises(BadArgument) as caught:
            config.client_context()
        assert caught.value.hint


def test_a_key_of_another_certificate() -> None:
    ours, theirs = server_tls(), server_tls(ca="theirs")
    with pytest.raises(BadArgument):
        TlsConfig(ours.cert, theirs.key, ours.ca).server_context()
