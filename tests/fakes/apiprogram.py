"""``python -m tests.fakes.apiserver``: the fake API server as a program."""

from __future__ import annotations

import argparse
import os
import sys

import yaml

from .apicontrol import objectsIn
from .apidefaults import SERVICE_CIDRS, Admission
from .apikinds import KINDS, KINDS_OF_1_20
from .apiresources import ControlRoot
from .apiserver import VERSION, FakeApi, QuietSite
from .apistate import Journal
from .apistore import Store

VERSION_1_20 = {**VERSION, "minor": "20", "gitVersion": "v1.20.2"}

DESCRIPTION = """\
A fake Kubernetes API server: Services, EndpointSlices, Endpoints, Nodes, Namespaces, Events.
It says "listening on URL" when it is ready, and ends at SIGTERM. With kubectl:

    python -m tests.fakes.apiserver --listen 127.0.0.1:6443 &
    kubectl --server http://127.0.0.1:6443 create service clusterip web --tcp=80:8080
    kubectl --server http://127.0.0.1:6443 get services --watch

What kubectl can do with it: version, api-resources, explain, get (tables, -o, -w, -A, -l, --field-selector,
--chunk-size), create, create service, expose service, apply (also --server-side), diff, replace, edit, patch
(strategic, merge, json, --subresource=status), label, annotate, describe, wait, delete. There are no Pods and no
controllers: EndpointSlices are created by whoever wants some. /fake/ scripts faults: see tests/fakes/apicontrol.py.
"""


def loadObjects(store: Store, path: str) -> int:
    """Put the objects of a YAML file, or of all those in a folder, into the store. Gives their number."""
    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if name.endswith((".yaml", ".yml", ".json")))
        return sum(loadObjects(store, os.path.join(path, name)) for name in names)
    count = 0
    with open(path, encoding="utf-8") as file:
        for document in yaml.load_all(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            for it in objectsIn(document) if document is not None else ():
                store.apply(it)
                count += 1
    return count


def main(argv: list[str]) -> None:
    """The program."""
    from twisted.internet import reactor
    from twisted.python import log

    parser = argparse.ArgumentParser(
        prog="python -m tests.fakes.apiserver", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--listen", default="127.0.0.1:0", help="ADDRESS:PORT, [ADDRESS]:PORT")
    parser.add_argument("--tls", metavar="DIR", help="folder with server.crt, server.key and ca.crt")
    parser.add_argument("--require-certificate", action="store_true", help="refuse clients without one")
    parser.add_argument("--token", action="append", help="a bearer token that counts")
    parser.add_argument("--objects", action="append", default=[], metavar="FILE", help="YAML file, or folder of such")
    parser.add_argument("--bookmark-seconds", type=float, default=60.0)
    parser.add_argument("--history", type=int, default=10_000)
    parser.add_argument("--watch-list", choices=("on", "off", "ignored"), default="on")
    parser.add_argument("--old", action="store_true", help="serve what 1.20 served: no discovery.k8s.io/v1")
    parser.add_argument("--control", metavar="ADDRESS:PORT", help="offer /fake/ there too, always without TLS")
    parser.add_argument("--state", metavar="FILE", help="keep what is stored there, and begin with what is in it")
    group = parser.add_argument_group("what becomes of objects that come through the API")
    group.add_argument("--service-cidr", default=",".join(SERVICE_CIDRS), metavar="NETWORK[,NETWORK]",
                       help="where ClusterIPs come from, one network per family; %(default)s")  # fmt: skip
    group.add_argument("--node-ports", default="30000-32767", metavar="FIRST-LAST", help="%(default)s")
    group.add_argument("--as-is", action="store_true",
                       help="take them as they are: no defaults, no addresses, no checks, no namespaces")  # fmt: skip
    options = parser.parse_args(argv)
    log.startLogging(sys.stderr, setStdout=False)  # type: ignore[no-untyped-call]
    store = Store(KINDS_OF_1_20 if options.old else KINDS, options.history)
    admission = None
    try:
        if not options.as_is:
            first, _, last = options.node_ports.partition("-")
            admission = Admission(store, options.service_cidr.split(","), (int(first), int(last)))
    except ValueError as error:
        parser.error(str(error))
    api = FakeApi(reactor, store, tokens=options.token, watchList="off" if options.old else options.watch_list,
                  bookmarkSeconds=options.bookmark_seconds, version=VERSION_1_20 if options.old else VERSION,
                  admission=admission, modern=not options.old)  # fmt: skip
    known = bool(options.state) and os.path.exists(options.state) and os.path.getsize(options.state) > 0
    if options.state:
        Journal(store, options.state)
    for path in () if known else options.objects:
        loadObjects(store, path)
    tls = None
    if options.tls:
        from .certificates import contextFrom

        tls = contextFrom(options.tls, options.require_certificate)
    host, port = _hostPort(options.listen)
    api.listen(host, port, tls)
    if options.control:
        host, port = _hostPort(options.control)
        reactor.listenTCP(port, QuietSite(ControlRoot(api)), interface=host)  # type: ignore[arg-type,no-untyped-call]
    print(f"listening on {api.url}", flush=True)
    reactor.run()


def _hostPort(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)
