"""The API server as a source: one reflector for each kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from random import random as anyNumber
from typing import Any, Protocol

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.web.iweb import IAgent
from zope.interface import implementer

from ..core.wire import HEADLESS_LABEL, PROXY_NAME_LABEL
from ..interfaces import IChannel, IEventRecorder, ISource, NotAvailable
from . import kubeconfig
from .agent import ApiAgent
from .authentication import Credentials
from .client import LIMITS, ApiClient, Limits, Resource
from .contact import Contact, Outage
from .credentials import SERVICE_ACCOUNT, ApiAccess, IApiOptions, explicit, inCluster
from .events import EventRecorder
from .execplugin import findCommand
from .proxychoice import withProxy
from .reached import Whereabouts
from .reflector import Reflector
from .tls import TlsPolicy


class IWatchOptions(IApiOptions, Protocol):
    """What is read of a ``[source:NAME]`` section beyond how to reach the server."""

    @property
    def watchList(self) -> str: ...


def resources(nodeName: str, proxyName: str = "") -> tuple[Resource, ...]:
    """
    What a service proxy reads. Selectors keep what is not for it on the server (``kubernetes/pkg/proxy``, and
    KEP-2447 for ``service-proxy-name``). A server older than 1.21 has its slices elsewhere, or only Endpoints.

    :param proxyName: serve the Services that carry this name, instead of those that carry none.
    """
    v1beta1 = Resource("EndpointSlice", "/apis/discovery.k8s.io/v1beta1/endpointslices", f"!{HEADLESS_LABEL}")
    endpoints = Resource("Endpoints", "/api/v1/endpoints", f"!{HEADLESS_LABEL}")
    slices = Resource(
        "EndpointSlice", "/apis/discovery.k8s.io/v1/endpointslices", f"!{HEADLESS_LABEL}", instead=(v1beta1, endpoints)
    )
    return (
        Resource(
            "Service",
            "/api/v1/services",
            labelSelector=f"{PROXY_NAME_LABEL}={proxyName}" if proxyName else f"!{PROXY_NAME_LABEL}",
            fieldSelector="spec.clusterIP!=None",
        ),
        slices,
        Resource("Node", "/api/v1/nodes", fieldSelector=f"metadata.name={nodeName}"),
        # KEP-1880, since 1.33
        Resource("ServiceCIDR", "/apis/networking.k8s.io/v1/servicecidrs", optional=True),
    )


def accessFor(
    name: str, options: IApiOptions, environ: Mapping[str, str], serviceAccount: str = SERVICE_ACCOUNT
) -> ApiAccess:
    """
    The access that a section asks for, once all of it that needs no network has been tried, certificates included.

    :raise NotAvailable: naming file and field.
    """
    try:
        if options.kubeconfig:
            access = kubeconfig.load(options.kubeconfig)
        elif options.inCluster:
            access = inCluster(environ, serviceAccount, options.server, options.tlsServerName)
        elif options.server:
            access = explicit(name, options)
        else:
            raise NotAvailable("give one of kubeconfig, in-cluster and server")
        access = withProxy(access, options.proxyUrl, environ)
        if access.secure:
            TlsPolicy(access)
    except NotAvailable as error:
        raise NotAvailable(f"source {name}: {str(error).removeprefix(f'source {name}: ')}")
    return access


def accessFaults(access: ApiAccess, environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """
    What speaks against an access that could be read, though it is no reason not to start: what would keep it from
    working as things are, and what is merely worth a warning. A line each.
    """
    faults = TlsPolicy(access).faults() if access.secure else []
    if access.exec is not None and access.secure:
        try:
            findCommand(access.exec, environ)
        except NotAvailable as error:
            faults.append(f"{access.origin}: {error}")
    return faults, list(access.warnings)


@implementer(ISource, IEventRecorder)
class ApiSource(Service):
    """
    Reads Services, EndpointSlices, this node and, where there are any, ServiceCIDRs from an API server.

    :param options: a ``[source:NAME]`` section.
    :param nodeName: which Node is ours.
    :param proxyName: see :func:`resources`.
    :param agent: sends the requests; by default one that the access makes. Where it has a ``close``, that ends it.
    :param random: gives numbers in [0, 1).
    :param limits: how long to wait for a silent server.
    :raise NotAvailable: where the options lead nowhere: an unreadable kubeconfig, a key that does not fit.
    """

    log = Logger()
    #: Without those that a server may lack: nothing waits for these.
    kinds: tuple[str, ...] = ("Service", "EndpointSlice", "Node")

    def __init__(
        self,
        reactor: Any,
        name: str,
        options: IWatchOptions,
        channel: IChannel,
        *,
        nodeName: str,
        proxyName: str = "",
        agent: IAgent | None = None,
        random: Callable[[], float] | None = None,
        environ: Mapping[str, str] | None = None,
        serviceAccount: str = SERVICE_ACCOUNT,
        limits: Limits = LIMITS,
    ) -> None:
        if not nodeName:
            raise NotAvailable(f"source {name}: the name of this node is not known")
        self.name = name
        environ = os.environ if environ is None else environ
        self._access = accessFor(name, options, environ, serviceAccount)
        self._credentials = Credentials(reactor, self._access, environ)
        if agent is None:
            agent = ApiAgent(reactor, self._access, credentials=self._credentials)
        self._agent: Any = agent
        client = ApiClient(reactor, self._access, agent, limits, self._credentials)
        self._whereabouts = Whereabouts(name, self._access.server, channel.say)
        if isinstance(agent, ApiAgent):
            agent.reached = self._met
        self._events = EventRecorder(reactor, client, name, nodeName, random or anyNumber)
        self._reflectors = {
            resource.kind: Reflector(
                reactor, client, resource, name, channel.say, random or anyNumber,
                streaming=options.watchList == "auto",
            )
            for resource in resources(nodeName, proxyName)
        }
        self._contact = Contact(reactor, name, self._outages)

    def startService(self) -> None:
        super().startService()  # type: ignore[no-untyped-call]
        self.log.info(
            "Source {name} reads from {server}: {manner}",
            server=self._access.server,
            name=self.name,
            manner=self._access.manner(),
        )
        for warning in self._access.warnings:
            self.log.warn("{warning}", warning=warning)
        self._whereabouts.tell()
        self._contact.start()
        self._events.start()
        for reflector in self._reflectors.values():
            reflector.start()

    def stopService(self) -> Deferred[None] | None:
        """Fires once no connection is left. Nothing is said any more once this has returned."""
        super().stopService()  # type: ignore[no-untyped-call]
        self._contact.stop()
        self._events.stop()
        for reflector in self._reflectors.values():
            reflector.stop()
        close = getattr(self._agent, "close", None)
        closed: Deferred[None] | None = None if close is None else close()
        return closed

    def ages(self) -> Mapping[str, float | None]:
        """See :meth:`ISource.ages`. What the server may lack is here while it does not."""
        return {kind: reflector.age() for kind, reflector in self._reflectors.items() if reflector.inUse}

    def counters(self) -> Mapping[str, Mapping[str, int]]:
        """For each kind what only grows, by name: for metrics."""
        return {kind: reflector.counters() for kind, reflector in self._reflectors.items()}

    def record(
        self, kind: str, namespace: str, name: str, uid: str, reason: str, action: str, note: str, warning: bool = False
    ) -> None:
        """Make it an Event of this server. See :meth:`IEventRecorder.record`."""
        self._events.record(kind, namespace, name, uid, reason, action, note, warning)

    def _met(self, address: str, port: int) -> None:
        if self.running:
            self._whereabouts.met(address, port)

    def _outages(self) -> dict[str, Outage]:
        found = ((kind, reflector.outage()) for kind, reflector in self._reflectors.items())
        return {kind: outage for kind, outage in found if outage is not None}

    def faults(self) -> Mapping[str, str]:
        """Kinds that are out of contact with the server, or whose last list is not believed yet."""
        faults = {kind: outage.error for kind, outage in self._outages().items()}
        for kind, reflector in self._reflectors.items():
            alarm = reflector.alarm
            if alarm:
                faults[kind] = alarm
        return faults

    def status(self) -> Mapping[str, Any]:
        """See :meth:`ISource.status`."""
        return {
            "type": "api",
            "server": self._access.server,
            "access": self._access.manner(),
            "origin": self._access.origin,
            "proxy": str(self._access.proxy or ""),
            "credentials": {**self._credentials.status(), **getattr(self._agent, "status", dict)()},
            "events": self._events.status(),
            "kinds": {kind: reflector.status() for kind, reflector in self._reflectors.items()},
        }
