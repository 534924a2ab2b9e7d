"""Addresses of NBD servers: nbd://host[:port][/export] or nbd+unix:///export?socket=PATH."""

from __future__ import annotations

from pyvmm.errors import ConfigError
from pyvmm.numerals import whole_number
from pyvmm.startup.types import Record

DEFAULT_PORT = 10809
_MAX_PORT = 0xFFFF
_FORMS = "write nbd://host[:port][/export] or nbd+unix:///export?socket=PATH"
_MAX_NAME_BYTES = 4096  # NBD's limit for any string


class NbdAddress(Record):
    """An export of a server: at ``socket_path`` if that is not empty, else at ``host``."""

    host: str = ""
    port: int = DEFAULT_PORT
    socket_path: str = ""
    export: str = ""


def is_nbd_uri(location: str) -> bool:
    """True if ``location`` is meant as an NBD URI; a file of that name is written ./nbd:..."""
    # A URI's scheme is written in any case (RFC 3986, 3.1 "Scheme").
    scheme, colon, _ = location.partition(":")
    return bool(colon) and scheme.lower() in ("nbd", "nbds", "nbd+unix", "nbds+unix")


def parse_nbd_uri(uri: str) -> NbdAddress:
    """Return the address that ``uri`` names; ConfigError.  %XX is decoded, as in any URI."""
    from urllib.parse import unquote, urlsplit  # a boot from a file needs none of it

    if any(character in uri for character in "\t\r\n"):  # urlsplit would leave them out
        raise ConfigError(uri, "has a tab or a line break; in a URI that is %09, %0D or %0A")
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname or "", _port(parts.netloc)
    except ValueError as error:
        raise ConfigError(uri, f"is no NBD address ({error}); {_FORMS}") from error
    if port is None:
        raise ConfigError(uri, f"its port is not a number from 1 to {_MAX_PORT}")
    # Not parse_qs, which takes + for a space: in a file's name it is none.
    query = [field.partition("=") for field in parts.query.split("&") if field]
    # A file's name need not be UTF-8; an export's must be.
    sockets = [unquote(value, errors="surrogateescape")
               for name, _, value in query if name == "socket" and value]
    export = unquote(parts.path, errors="surrogateescape").removeprefix("/")
    if parts.scheme.startswith("nbds"):
        raise ConfigError(uri, "asks for TLS, which pyvmm does not speak")
    try:
        host.encode("idna")  # as it is looked up
    except UnicodeError:
        raise ConfigError(
            uri, "names a host that cannot be: a name's parts have 1 to 63 bytes"
        ) from None
    if len(query) != len(sockets) or parts.fragment or parts.username is not None:
        raise ConfigError(uri, f"has parts that pyvmm does not know; {_FORMS}")
    if not export.isascii() and _is_garbled(export):
        raise ConfigError(uri, "its export's name is not UTF-8")
    if len(export.encode()) > _MAX_NAME_BYTES:
        raise ConfigError(uri, f"its export's name is longer than {_MAX_NAME_BYTES} bytes")
    if parts.scheme == "nbd+unix":
        if parts.netloc or len(sockets) != 1:
            raise ConfigError(uri, "names no Unix socket; write nbd+unix:///export?socket=PATH")
        return NbdAddress(socket_path=sockets[0], export=export)
    if not host or sockets:
        raise ConfigError(uri, "names no host; write nbd://host[:port][/export]")
    return NbdAddress(host=host, port=port, export=export)


def _port(netloc: str) -> int | None:
    """Return the port that ``netloc``, ``host:port`` or ``[host]:port``, gives, else NBD's default;
    None if that is no port."""
    text = netloc.rpartition("@")[2].rpartition("]")[2].partition(":")[2]
    return whole_number(text, 1, _MAX_PORT) if text else DEFAULT_PORT


def _is_garbled(text: str) -> bool:
    """True if ``text`` came from an argument that is not UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)
