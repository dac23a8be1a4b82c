"""
Which of Kubernetes' end-to-end tests of service proxies are told as scenarios here, and where.

A scenario's docstring begins with the title of the original in quotes. ``python -m tests.integration.titles`` prints
the list; ``tests/unit/test_titles.py`` sees to it that no title is missing and none is invented.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from unittest import TestCase

_TITLE = re.compile(r'\s*"(should [^"]+)"')


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line for line in textwrap.dedent(text).splitlines() if line)


#: ``[sig-network]`` and what comes next → the titles there (kubernetes ``test/e2e/network``)
WANTED: dict[str, tuple[str, ...]] = {
    "Services": _lines("""
        should serve a basic endpoint from pods
        should serve multiport endpoints from pods
        should be updated after adding or deleting ports
        should preserve source pod IP for traffic thru service cluster IP
        should allow pods to hairpin back to themselves through services
        should be able to up and down services
        should work after the service has been recreated
        should work after restarting kube-proxy
        should work after restarting apiserver
        should be able to create a functioning NodePort service
        should be possible to connect to a service via ExternalIP when the external IP is not assigned to a node
        should be able to update service type to NodePort listening on same port number but different protocols
        should be able to change the type from ExternalName to ClusterIP
        should be able to change the type from ExternalName to NodePort
        should be able to change the type from ClusterIP to ExternalName
        should be able to change the type from NodePort to ExternalName
        should release NodePorts on delete
        should create endpoints for unready pods
        should be able to connect to terminating and unready endpoints if PublishNotReadyAddresses is true
        should not be able to connect to terminating and unready endpoints if PublishNotReadyAddresses is false
        should have session affinity work for service with type clusterIP
        should have session affinity timeout work for service with type clusterIP
        should be able to switch session affinity for service with type clusterIP
        should have session affinity work for NodePort service
        should have session affinity timeout work for NodePort service
        should be able to switch session affinity for NodePort service
        should implement service.kubernetes.io/service-proxy-name
        should implement service.kubernetes.io/headless
        should be rejected when no endpoints exist
        should be rejected for evicted pods (no endpoints exist)
        should respect internalTrafficPolicy=Local Pod to Pod
        should respect internalTrafficPolicy=Local Pod (hostNetwork: true) to Pod
        should respect internalTrafficPolicy=Local Pod and Node, to Pod (hostNetwork: true)
        should fail health check node port if there are only terminating endpoints
        should fallback to terminating endpoints when there are no ready endpoints with internalTrafficPolicy=Cluster
        should fallback to local terminating endpoints when there are no ready endpoints with internalTrafficPolicy=Local
        should fallback to terminating endpoints when there are no ready endpoints with externallTrafficPolicy=Cluster
        should fallback to local terminating endpoints when there are no ready endpoints with externalTrafficPolicy=Local
        should complete a service status lifecycle
        should delete a collection of services
        should serve endpoints on same port and different protocols
        should serve endpoints on same port and different protocol for internal traffic on Type LoadBalancer
        should allow creating a basic SCTP service with pod and endpoints
    """),  # noqa: E501
    "Conntrack": _lines("""
        should be able to preserve UDP traffic when server pod cycles for a NodePort service
        should be able to preserve UDP traffic when server pod cycles for a ClusterIP service
        should be able to preserve UDP traffic when server pod cycles for a ClusterIP service and client is hostNetwork
        should be able to preserve UDP traffic when server pod cycles for a ClusterIP service with InternalTrafficPolicy set to Local
        should be able to preserve UDP traffic when initial unready endpoints get ready
        should drop INVALID conntrack entries [Privileged]
    """),  # noqa: E501
    "Networking Granular Checks: Services": _lines("""
        should function for pod-Service: http
        should function for pod-Service: udp
        should function for node-Service: http
        should function for node-Service: udp
        should function for endpoint-Service: http
        should function for endpoint-Service: udp
        should update endpoints: http
        should update endpoints: udp
        should update nodePort: http
        should update nodePort: udp
        should support basic nodePort: udp functionality
        should function for client IP based session affinity: http
        should function for client IP based session affinity: udp
        should be able to handle large requests: http
        should be able to handle large requests: udp
        should function for multiple endpoint-Services with same selector
        should function for service endpoints using hostNetwork
        should recreate its iptables rules if they are deleted
    """),
    "LoadBalancers": _lines("""
        should be able to change the type and ports of a TCP service
        should be able to change the type and ports of a UDP service
        should only allow access from service loadbalancer source ranges
        should have session affinity work for LoadBalancer service with Local traffic policy
        should have session affinity work for LoadBalancer service with Cluster traffic policy
        should be able to switch session affinity for LoadBalancer service with Local traffic policy
        should be able to switch session affinity for LoadBalancer service with Cluster traffic policy
        should be able to create LoadBalancer Service without NodePort and change it
        should be able to preserve UDP traffic when server pod cycles for a LoadBalancer service on different nodes
        should be able to preserve UDP traffic when server pod cycles for a LoadBalancer service on the same nodes
        should not have connectivity disruption during rolling update with externalTrafficPolicy=Cluster
        should not have connectivity disruption during rolling update with externalTrafficPolicy=Local
    """),
    "LoadBalancers ExternalTrafficPolicy: Local": _lines("""
        should work for type=LoadBalancer
        should work for type=NodePort
        should only target nodes with endpoints
        should target all nodes with endpoints
        should work from pods
        should handle updates to ExternalTrafficPolicy field
    """),
    "KubeProxy": _lines("""
        should set TCP CLOSE_WAIT timeout [Privileged]
    """),
    "Traffic Distribution": _lines("""
        should route traffic to an endpoint in the same zone when using PreferClose
        should route traffic correctly between pods on multiple nodes when using PreferClose
        should route traffic to an endpoint in the same zone when using PreferSameZone
        should route traffic correctly between pods on multiple nodes when using PreferSameZone
        should route traffic to an endpoint on the same node or fall back to same zone when using PreferSameNode
        should route traffic to an endpoint on the same node when using PreferSameNode and fall back when the endpoint becomes unavailable
    """),  # noqa: E501
    "Topology Hints": _lines("""
        should distribute endpoints evenly
    """),
}

#: Titles that there is no scenario for, and why.
LEFT_OUT: dict[str, str] = {
    "should preserve source pod IP for traffic thru service cluster IP": (
        "A proxy in userspace opens the connection to the pod itself; upstream skips the test for it, too."
    ),
}


def _strip(text: str) -> str:
    return " ".join(text.split())


def _tests() -> Iterator[tuple[str, str]]:
    """The id of each scenario's test, and its docstring."""
    for path in sorted(Path(__file__).parent.glob("test_e2e_*.py")):
        module = importlib.import_module(f"{__package__}.{path.stem}")
        for name, kind in sorted(vars(module).items()):
            if inspect.isclass(kind) and issubclass(kind, TestCase) and kind.__module__ == module.__name__:
                for test in dir(kind):
                    if test.startswith("test_"):
                        yield f"{module.__name__}.{name}.{test}", getattr(kind, test).__doc__ or ""


def titles() -> dict[str, list[str]]:
    """Each title that a test claims → the ids of the tests that do."""
    found: dict[str, list[str]] = {}
    for identity, said in _tests():
        title = _TITLE.match(_strip(said))
        if title:
            found.setdefault(title[1], []).append(identity)
    return found


def main() -> None:
    found = titles()
    for group, names in WANTED.items():
        print(f"[sig-network] {group}")
        for name in names:
            print(f"  {name}")
            for line in found.get(name) or [f"left out: {LEFT_OUT.get(name, '')}"]:
                print(f"    {line}")


if __name__ == "__main__":
    main()
