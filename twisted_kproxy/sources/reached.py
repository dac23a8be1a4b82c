"""At which addresses the API server of a source is reached."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

from ..core.addresses import BadAddress, canonical
from ..core.values import Reached

#: So many addresses are remembered: a name may stand for more, and for others every time.
MOST = 32
_PORTS = {"https": 443, "http": 80}


class Whereabouts:
    """
    Says :class:`~twisted_kproxy.core.values.Reached` each time that another address becomes known: that in the
    server's URL, where it is one, and those that connections were made to. An address stays until there are too many:
    a server that is not talked to just now is still one.

    :param server: its URL.
    :param say: takes the words.
    """

    def __init__(self, source: str, server: str, say: Callable[[Reached], None]) -> None:
        self._source = source
        self._say = say
        parts = urlsplit(server)
        self._fixed = _read(parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0))
        self._met: dict[tuple[str, int], None] = {}  # the one that was met last is last

    def tell(self) -> None:
        """Say what is known by now."""
        self._say(Reached(self._source, frozenset([*self._fixed, *self._met])))

    def met(self, address: str, port: int) -> None:
        """A connection was made there."""
        for server in _read(address, port):
            if server in self._fixed:
                continue
            isNew = server not in self._met
            self._met.pop(server, None)
            self._met[server] = None
            if isNew:
                if len(self._met) > MOST:
                    del self._met[next(iter(self._met))]
                self.tell()


def _read(host: str, port: int) -> list[tuple[str, int]]:
    """The address and port, unless the host is a name."""
    try:
        return [(canonical(host)[0], port)]
    except BadAddress:
        return []
