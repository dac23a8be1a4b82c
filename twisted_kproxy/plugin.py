"""
Plug-ins: a name for the configuration to say, and the dotted name of what it stands for.

Importing the drop-in (:file:`twisted/plugins/kproxy_plugin.py`) loads no implementation; a missing library fails only
when it is chosen. Third parties offer their own makers from a file of theirs in :mod:`twisted.plugins`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from twisted.plugin import IPlugin, getPlugins
from twisted.python.reflect import namedAny
from zope.interface import implementer

from .interfaces import IDataplaneMaker, IPolicyMaker, ISourceMaker, IWriterMaker, KproxyError, NotAvailable


class UnknownPlugin(KproxyError):
    """A name that nobody offers; the text names those that are."""


class _Maker:
    """
    :param name: what the configuration says.
    :param factory: dotted name of what is called to make it.
    :param needs: what to install where that cannot be imported.
    """

    def __init__(self, name: str, factory: str, needs: str = "") -> None:
        self.name = name
        self.factory = factory
        self.needs = needs

    def make(self, *args: Any, **kw: Any) -> Any:
        try:
            factory: Any = namedAny(self.factory)  # type: ignore[no-untyped-call]
        except ImportError as error:
            hint = f"; install {self.needs}" if self.needs else ""
            raise NotAvailable(f"{self.name} is not available here: {error}{hint}") from error
        return factory(*args, **kw)


@implementer(IPlugin, ISourceMaker)
class SourceMaker(_Maker):
    """Offers a type of source."""


@implementer(IPlugin, IPolicyMaker)
class PolicyMaker(_Maker):
    """Offers a balancing policy."""


@implementer(IPlugin, IWriterMaker)
class WriterMaker(_Maker):
    """Offers a rule writer."""


@implementer(IPlugin, IDataplaneMaker)
class DataplaneMaker(_Maker):
    """Offers a dataplane."""


def names(interface: Any) -> list[str]:
    """What is offered under an interface (:class:`~twisted_kproxy.interfaces.IPolicyMaker`, …), sorted."""
    return sorted({maker.name for maker in getPlugins(interface)})


def find(interface: Any, name: str, offered: Iterable[Any] | None = None) -> Any:
    """
    The maker of that name.

    :param offered: for tests; instead of what is installed.
    :raise UnknownPlugin: with the known names.
    """
    known = set()
    for maker in getPlugins(interface) if offered is None else offered:
        if maker.name == name:
            return maker
        known.add(maker.name)
    raise UnknownPlugin(f"nothing is known as {name!r}; there is {', '.join(sorted(known)) or 'nothing'}")
