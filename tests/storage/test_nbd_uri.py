"""NBD addresses, and how they may be wrong."""

from __future__ import annotations

import pytest

from pyvmm.errors import ConfigError
from pyvmm.storage.nbd_uri import NbdAddress, is_nbd_uri, parse_nbd_uri


@pytest.mark.parametrize(("uri", "address"), [
    ("nbd://host", NbdAddress(host="host")),
    ("nbd://host/", NbdAddress(host="host")),
    ("nbd://host:7777/a/b", NbdAddress(host="host", port=7777, export="a/b")),
    ("nbd://[::1]:1/x%20y", NbdAddress(host="::1", port=1, export="x y")),
    ("nbd://10.0.0.1//x", NbdAddress(host="10.0.0.1", export="/x")),
    ("nbd+unix:///?socket=/run/n.sock", NbdAddress(socket_path="/run/n.sock")),
    ("nbd+unix:///disk?socket=n%3f+1", NbdAddress(socket_path="n?+1", export="disk")),
    ("nbd+unix://?socket=s", NbdAddress(socket_path="s")),
    ("nbd+unix:///?socket=%ff", NbdAddress(socket_path="\udcff")),
])
def test_addresses(uri: str, address: NbdAddress) -> None:
    assert is_nbd_uri(uri)
    assert parse_nbd_uri(uri) == address


@pytest.mark.parametrize(("uri", "problem"), [
    ("nbd://", "names no host"), ("nbd:///export", "names no host"), ("nbd:host", "names no host"),
    ("nbd://host:0", "from 1 to 65535"), ("nbd://host:70000", "from 1 to 65535"),
    ("nbd://host:port", "from 1 to 65535"), ("nbd://[::1]:x", "from 1 to 65535"),
    ("nbd://[::1", "no NBD address"),
    ("nbd://host?socket=x", "names no host"), ("nbd+unix:///x", "no Unix socket"),
    ("nbd+unix://host/x?socket=s", "no Unix socket"), ("nbd+unix:///?socket=", "does not know"),
    ("nbd+unix:///?socket=a&socket=b", "no Unix socket"), ("nbds://host", "TLS"),
    ("nbds+unix:///?socket=s", "TLS"), ("nbd://host/x?tls=1", "does not know"),
    ("nbd://me@host/", "does not know"), ("nbd://host/x#y", "does not know"),
    ("nbd://host/" + "x" * 4097, "longer than 4096"),
    # Found by fuzz: a file name's bytes, as sys.argv has them, or as a URI writes them.
    ("nbd://host/\udc89", "not UTF-8"), ("nbd+unix:///%89?socket=s", "not UTF-8"),
    ("nbd://a..b", "parts have 1 to 63"), (f"nbd://{'a' * 64}/x", "parts have 1 to 63"),
    ("nbd://\udc89", "parts have 1 to 63"),
])
def test_what_is_no_address(uri: str, problem: str) -> None:
    assert is_nbd_uri(uri)
    with pytest.raises(ConfigError) as caught:
        parse_nbd_uri(uri)
    assert caught.value.subject == uri
    assert problem in caught.value.problem


def test_files_are_no_addresses() -> None:
    assert not any(map(is_nbd_uri, ("disk.img", "nbd", "./nbd:x", "/nbd://x")))
