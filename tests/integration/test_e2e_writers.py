"""
The scenarios that every rule writer must bring about, with the writers for iptables. Those of ``test_e2e_services.py``
and its neighbours are for nftables.
"""

from __future__ import annotations

from collections.abc import Sequence

from twisted.trial.unittest import TestCase

from tests.integration.test_iptables import missing

from .test_e2e_conntrack import ConntrackCore
from .test_e2e_loadbalancers import LoadBalancersCore
from .test_e2e_networking import NetworkingCore
from .test_e2e_services import ServicesCore
from .test_e2e_upheavals import UpheavalsCore


def damages(v4: str, v6: str) -> Sequence[Sequence[str]]:
    """Of both families at once: the chain for pods and outside, that for the node, one table, all of it."""
    parts = ("{0} -t nat -F PREROUTING", "{0} -t nat -F OUTPUT", "{0} -t nat -F",
             "for t in raw mangle nat filter; do {0} -t $t -F; {0} -t $t -X; done")
    return [("sh", "-c", "; ".join(part.format(tool) for tool in (v4, v6)) + "; true") for part in parts]


class PythonIptables:
    """With rules by python-iptables."""

    skip = missing()
    writer = "python-iptables"
    damages = damages("iptables-legacy", "ip6tables-legacy")


class Iptables:
    """With rules by iptables-restore, of whichever variant the node has."""

    skip = missing()
    writer = "iptables"
    damages = damages("iptables", "ip6tables")


class PythonIptablesConntrackTests(PythonIptables, ConntrackCore, TestCase):
    pass


class PythonIptablesLoadBalancersTests(PythonIptables, LoadBalancersCore, TestCase):
    pass


class PythonIptablesNetworkingTests(PythonIptables, NetworkingCore, TestCase):
    pass


class PythonIptablesServicesTests(PythonIptables, ServicesCore, TestCase):
    pass


class PythonIptablesUpheavalsTests(PythonIptables, UpheavalsCore, TestCase):
    pass


class IptablesConntrackTests(Iptables, ConntrackCore, TestCase):
    pass


class IptablesLoadBalancersTests(Iptables, LoadBalancersCore, TestCase):
    pass


class IptablesNetworkingTests(Iptables, NetworkingCore, TestCase):
    pass


class IptablesServicesTests(Iptables, ServicesCore, TestCase):
    pass


class IptablesUpheavalsTests(Iptables, UpheavalsCore, TestCase):
    pass
