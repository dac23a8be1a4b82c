"""
Every interface of the project. Read this page first; each part of the house is one of these.

What flows: an :class:`ISource` gives its words to :class:`IChannel`; the cluster behind it merges them into a
:class:`~twisted_kproxy.core.values.ServiceMap`; the syncer hands each new map, as an
:class:`~twisted_kproxy.core.changes.Update`, to every :class:`IUpdateListener` in order: the load balancer first, then
the dataplane. An :class:`IProxier` accepts connections for one pool and asks the :class:`ILoadBalancer` where each one
goes.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from twisted.application.service import IService
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocolFactory
from twisted.plugin import IPlugin
from zope.interface import Attribute, Interface

from .core.changes import Update
from .core.rules import Delta, Rule, Ruleset
from .core.values import Endpoint, FrontendKey, Outcome, PoolName, Reached, Word

# --- errors that travel between parts -------------------------------------------------------------------------------


class KproxyError(Exception):
    """Base of what the parts tell each other. The text is what an operator reads: what, where, and what to do."""


class NotAvailable(KproxyError):
    """A chosen part cannot work on this machine; the text says what is missing and how to get it."""


class RulesRejected(KproxyError):
    """
    The kernel or the rule tool refused; nothing has changed.

    :ivar frontends: those that were refused, where that is known.
    """

    def __init__(self, text: str, frontends: Iterable[FrontendKey] = ()) -> None:
        super().__init__(text)
        self.frontends = frozenset(frontends)


class RulesNotJudged(RulesRejected):
    """
    Nobody got to judge the rules: a tool did not run or took too long, a lock was not given. The rules may be good.
    What is in force has to be read before the next step.
    """


class NoEndpoint(KproxyError):
    """There is no endpoint to choose: the pool is unknown or empty, or all of it was to be avoided."""


class ApiError(KproxyError):
    """
    The API server said no.

    :ivar code: the HTTP status.
    :ivar reason: the Status object's reason, ``""`` where there was none.
    """

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}" if reason else f"{code}: {message}")
        self.code = code
        self.reason = reason


# --- sources ---------------------------------------------------------------------------------------------------------


class IChannel(Interface):
    """Takes what sources say. Never raises, never blocks."""

    def say(word: Word | Reached) -> None:
        """Take over one word; the state that follows from it is in force when this returns."""


class ISource(IService):
    """
    Says what exists. Once started it says ``Replaced`` once for each of its kinds, then one word per change, until
    it is stopped. Losing contact says nothing: what was said last stays true. An object that it calls rejected it has
    logged, once for each reason.
    """

    name: str = Attribute("the NAME of its ``[source:NAME]`` section")
    kinds: tuple[str, ...] = Attribute("the kinds that it says ``Replaced`` for")

    def ages() -> Mapping[str, float | None]:
        """
        For each of its kinds, and others that it reads where there are any, seconds since the source was last heard to
        be in agreement with what it was told of (``None``: never yet). Seconds are of the monotonic clock.
        """

    def status() -> Mapping[str, Any]:
        """JSON-able facts for operators: where it reads, its state in words, the last error. No secrets."""

    def faults() -> Mapping[str, str]:
        """
        What it cannot read now, and why: file, folder or kind → reason; what was read of it before counts on. Also
        ``FILE:LINE`` → what is wrong there with something that no word names.
        """


class IEventRecorder(Interface):
    """Tells the cluster's operators of something, as an Event about an object (:command:`kubectl get events`)."""

    def record(
        kind: str, namespace: str, name: str, uid: str, reason: str, action: str, note: str, warning: bool = False
    ) -> None:
        """
        Pass on one event. Never raises, never blocks; what cannot be passed on in time is let go, so nothing may
        depend on it. The same event again within minutes is told once more only as a number.

        :param kind: of the object that it is about, ``Service`` or ``Node``.
        :param namespace: of that object, ``""`` for a Node.
        :param uid: of that object, ``""`` where it is not known.
        :param reason: why it is told: one word in CamelCase, for machines.
        :param action: what was done or tried: one word in CamelCase, for machines.
        :param note: the same for people, in a sentence or two.
        :param warning: whether somebody should look after it.
        """


# --- updates ---------------------------------------------------------------------------------------------------------


class IUpdateListener(Interface):
    """Something that follows this node's service map."""

    def onUpdate(update: Update) -> Deferred[None]:
        """
        Bring the world in line with ``update.current``. Updates come one at a time: the next one only after the
        Deferred of this one has fired.

        :return: fires once the map is in force; fails (:class:`RulesRejected`, …) when it is not: the same or a
            newer map will come again with ``full`` set.
        """


class ISyncObserver(Interface):
    """Is told what the syncer does: for health and metrics. Never blocks, never raises."""

    def queued() -> None:
        """There is something that is not in force yet."""

    def began(update: Update) -> None:
        """An update goes out, with all that was queued; what is queued from now on waits for the next."""

    def applied(update: Update, seconds: float) -> None:
        """The update that went out is in force; it took so long."""

    def failed(update: Update, seconds: float) -> None:
        """An update could not be put into force; it will be tried again, in full."""


class IDataplane(IUpdateListener):
    """Makes the node act as the service map says."""

    def start() -> Deferred[None]:
        """
        Get ready, without changing how the node acts: find out what is in force from an earlier run.

        :return: fails with :class:`NotAvailable`.
        """

    def stop(drainSeconds: float) -> Deferred[None]:
        """
        Stop serving: nothing new is accepted, what is open may go on for so long, then it is cut.
        A second call with ``0`` cuts it now.
        """

    def status() -> Mapping[str, Any]:
        """JSON-able facts for operators."""

    def unserved() -> Mapping[str, str]:
        """Names of service ports that are not served as the map says → why."""


# --- balancing -------------------------------------------------------------------------------------------------------


class IBalancingPolicy(Interface):
    """
    Chooses among the endpoints of one pool. One instance per pool; it is told of changes and keeps what it needs.
    """

    def replaced(endpoints: tuple[Endpoint, ...]) -> None:
        """The pool is now these, sorted, none twice. What was known of those that stay is kept."""

    def choose(client: str, avoid: Collection[Endpoint]) -> Endpoint | None:
        """
        Choose an endpoint for a client's address, in O(1) for a healthy pool; one that is not in ``avoid``, or
        ``None`` where there is no such.
        """

    def opened(endpoint: Endpoint) -> None:
        """A connection to it begins."""

    def closed(endpoint: Endpoint) -> None:
        """A connection to it has ended. Also called for endpoints that have left the pool meanwhile."""


class ILoadBalancer(IUpdateListener):
    """Holds endpoints, policy and affinity of every pool, and says where each connection goes. No I/O."""

    def nextEndpoint(pool: PoolName, client: str, avoid: Collection[Endpoint] = ()) -> Endpoint:
        """
        Where the next connection (or UDP flow) of a client goes.

        :param client: its address, canonical text without port.
        :param avoid: endpoints that have just failed this very client. When not empty, affinity is set aside, and
            the client is bound anew to what is chosen now. When it covers the whole pool, the pool is walked again
            from its next position: a pool with one endpoint is tried again.
        :raise NoEndpoint: where the pool has none.
        """

    def opened(pool: PoolName, endpoint: Endpoint) -> None:
        """A connection to that endpoint is established."""

    def closed(pool: PoolName, endpoint: Endpoint) -> None:
        """A connection that was reported as opened has ended."""

    def endpoints(pool: PoolName) -> tuple[Endpoint, ...]:
        """The endpoints of a pool now; empty where it is unknown."""

    def status() -> Mapping[str, Any]:
        """``{pool: {policy, endpoints: {address: active}, affinitySeconds, affinityEntries}}``."""


# --- userspace -------------------------------------------------------------------------------------------------------


class IRelay(Interface):
    """
    Carries bytes between two connected sockets: the seam behind which engines may be exchanged. Back-pressure both
    ways, half-close both ways, a reset stays a reset.
    """

    name: str = Attribute("the name under which it is chosen")

    def relay(
        client: socket.socket, backend: socket.socket, early: bytes, ended: Callable[[Outcome], None]
    ) -> Callable[[], None]:
        """
        Take over two connected non-blocking sockets; the relay closes both, and sees to it that keepalive probes find
        a backend that has vanished.

        :param early: what was already read from the client, to be sent first; at most 64 KiB.
        :param ended: called once, when both are closed; perhaps before this returns.
        :return: what resets both sides, at once or soon; harmless when they are closed.
        """

    def stop() -> Deferred[None]:
        """Let go of everything: what is still open is reset. Fires when processes and threads have ended."""

    def status() -> Mapping[str, Any]:
        """JSON-able: ``{engine, active, …}``."""


class IProxier(Interface):
    """
    Serves one pool of one service port on a socket of this node: a Twisted protocol factory for TCP, a
    DatagramProtocol for UDP.
    """

    pool: PoolName = Attribute("the pool that it serves")
    port: int = Attribute("the local port that the rules lead to; 0 before listen()")

    def listen(port: int = 0) -> None:
        """
        Open the socket on every address of the pool's family: on that port, or on any for 0.

        :raise OSError: (or :class:`twisted.internet.error.CannotListenError`) when that cannot be.
        """

    def renamed(pool: PoolName) -> None:
        """The pool has another name from now on; socket, connections and flows go on."""

    def endpointsChanged(endpoints: tuple[Endpoint, ...]) -> None:
        """The pool is now these. Connections go on; UDP flows to what is no longer there move at once."""

    def stopListening() -> None:
        """Close the listening socket now. TCP connections go on; UDP flows end. Twice is harmless."""

    def drained() -> Deferred[None]:
        """Fires once no connection is left (at once when there is none). To be called after stopListening()."""

    def abort() -> None:
        """Cut every connection that is left, a bounded number per turn of the reactor."""

    def status() -> Mapping[str, Any]:
        """JSON-able: ``{protocol, port, active, opened, …}``."""


class IProxierFactory(IProtocolFactory):
    """The TCP side of :class:`IProxier`: a factory whose protocols are the accepted connections."""


class ITrafficObserver(Interface):
    """Is told what connections do; counts, never blocks, never raises."""

    def opened(pool: PoolName, endpoint: Endpoint, seconds: float) -> None:
        """A connection (or UDP flow) to an endpoint is established, so long after the client came."""

    def missed(pool: PoolName, endpoint: Endpoint, reason: str) -> None:
        """
        One try at an endpoint failed; the client knows nothing of it yet.

        :param reason: ``refused``, ``timeout``, ``unreachable``, ``reset`` or ``error``.
        """

    def failed(pool: PoolName, reason: str) -> None:
        """
        A client could not be served.

        :param reason: that of the last try, or ``no-endpoint``, ``client-gone``, ``limit``.
        """

    def closed(pool: PoolName, endpoint: Endpoint, outcome: Outcome) -> None:
        """A connection that was opened has ended."""


# --- rules -----------------------------------------------------------------------------------------------------------


class IRuleWriter(Interface):
    """
    Puts rules into the kernel: ours and only ours. One call at a time; each is all or nothing.
    """

    name: str = Attribute("the name under which it is chosen")
    place: str = Attribute(
        "where its rules are, in a few words; '' while that is not known (before probe()). Two writers that say the "
        "same write the same rules, in different ways; 'nowhere' for one that writes none"
    )

    def probe() -> Deferred[str]:
        """
        Find out whether this writer works here, leaving no trace.

        :return: fires with a few words for the log (version, what was tried); fails with :class:`NotAvailable`.
        """

    def adopt() -> Deferred[Ruleset | None]:
        """
        Read what of ours is in force now. Fires with ``None`` where there is nothing, or what is there cannot be
        understood: then only :meth:`replace` is allowed.
        """

    def apply(delta: Delta) -> Deferred[None]:
        """Apply a step to what is in force, in one transaction. Fails with :class:`RulesRejected`."""

    def replace(ruleset: Ruleset) -> Deferred[None]:
        """
        Make exactly this the state in force, in one transaction in which no packet sees anything but the old or
        the new state. Fails with :class:`RulesRejected`.
        """

    def watch(changed: Callable[[], None] | None) -> None:
        """Call back soon after somebody else has changed or removed our rules; ``None`` ends it."""

    def cleanup() -> Deferred[bool]:
        """Remove every rule of ours, of whichever run, and nothing else. Fires with whether there was any."""

    def close() -> Deferred[None]:
        """Let go of processes and sockets. Rules stay."""


class IRulePlane(IDataplane):
    """The dataplane that writes rules. The userspace dataplane hands it maps whose pools are sockets."""

    def ruleInForce(key: FrontendKey) -> Rule | None:
        """
        After start(): what rules left by an earlier run say of that frontend; ``None`` where there are none. Listening
        again where they lead keeps them valid.
        """


# --- plug-ins --------------------------------------------------------------------------------------------------------


class IMaker(IPlugin):
    """
    A plug-in: a name that the configuration may say, and where to find what it stands for. Nothing is imported
    before it is chosen.
    """

    name: str = Attribute("what the configuration says")

    def make(*args: Any, **kw: Any) -> Any:
        """Import and call the thing. Raises :class:`NotAvailable` where a library is missing."""


class ISourceMaker(IMaker):
    """Makes an :class:`ISource`: ``make(reactor, name, options, channel)``."""


class IPolicyMaker(IMaker):
    """Makes an :class:`IBalancingPolicy`: ``make()``."""


class IWriterMaker(IMaker):
    """Makes an :class:`IRuleWriter`: ``make(reactor)``."""


class IDataplaneMaker(IMaker):
    """Makes an :class:`IDataplane`."""
