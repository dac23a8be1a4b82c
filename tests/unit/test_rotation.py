"""Credentials that rotate every ninety seconds under a source that runs for an hour: what it costs."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from treq.testing import RequestTraversalAgent
from twisted.trial.unittest import SynchronousTestCase

from tests.fakes.apiserver import FakeApi
from tests.fakes.processes import FakeProcess, ProcessClock, credential
from tests.shared.sources import Words, manifest
from tests.unit.test_execplugin import NOON, stamp
from twisted_kproxy.config import ApiOptions
from twisted_kproxy.sources import api
from twisted_kproxy.sources.api import ApiSource
from twisted_kproxy.sources.authentication import Credentials
from twisted_kproxy.sources.credentials import ApiAccess, Exec

LIFE = 90.0
KINDS = 4


class RotationTests(SynchronousTestCase):
    """The server takes the newest token only, from the moment it is there."""

    def setUp(self) -> None:
        self.clock = ProcessClock()
        self.api = FakeApi(self.clock, tokens=[self.token(0)])
        self.agent = RequestTraversalAgent(self.api.resource)
        self.words = Words()
        self.path = os.path.abspath(self.mktemp())
        self.api.store.apply(manifest("web"))

    def token(self, number: int) -> str:
        return f"token-{number}"

    def write(self, number: int) -> None:
        with open(f"{self.path}.new", "w") as file:
            file.write(self.token(number))
        os.replace(f"{self.path}.new", self.path)

    def source(self, **options: Any) -> ApiSource:
        # The fake server speaks no TLS here, and nothing in between does either: credentials go with https only.
        source = ApiSource(
            self.clock, "main", ApiOptions("main", server="https://192.0.2.1", **options), self.words, nodeName="n",
            agent=self.agent, random=lambda: 0.5, environ={"PATH": "/usr/bin:/bin"},
        )
        self.addCleanup(self.stopped, source)
        return source

    def stopped(self, source: ApiSource) -> None:
        source.stopService()
        for watch in list(self.api.watches):
            watch.end()
        self.agent.flush()
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def pass_(self, seconds: float) -> None:
        self.agent.flush()
        for _ in range(int(seconds * 2)):
            self.clock.advance(0.5)
            self.agent.flush()

    def rotates(self, source: ApiSource, write: bool, shift: float) -> None:
        """Forty rotations; each time every watch ends, at the worst moment."""
        source.startService()
        self.pass_(1)
        for number in range(1, 41):
            if write:
                self.write(number)
            self.api.tokens = {self.token(number): "node"}
            self.pass_(shift)
            self.api.closeWatches()
            self.api.requests.clear()
            self.api.store.apply(manifest("web", port=1000 + number))
            self.pass_(10)
            refused = Counter(it.resource for it in self.api.requests if it.status == 401)
            self.assertLessEqual(max(refused.values(), default=0), 1, f"rotation {number}: {refused}")
            self.assertEqual(len(self.api.watches), KINDS)
            self.assertEqual(self.words.state["Service"]["shop/web"].spec.ports[0].port, 1000 + number)
            self.pass_(LIFE - 10 - shift)

    def test_tokenFile(self) -> None:
        """From a file: at most one request of each kind is refused, and nothing is missed."""
        self.write(0)
        self.rotates(self.source(tokenFile=self.path), True, 0)

    def test_tokenFileLater(self) -> None:
        """The same when watches end between two readings of the file."""
        self.write(0)
        self.rotates(self.source(tokenFile=self.path), True, 30)

    def plugin(self) -> ApiSource:
        """A source whose credentials come from a plugin, at a time of day that goes with the test's clock."""
        spec = Exec("/bin/true", "client.authentication.k8s.io/v1")
        access = ApiAccess("https://192.0.2.1", "test", exec=spec)

        def credentials(clock: Any, access: ApiAccess, environ: Any) -> Credentials:
            return Credentials(clock, access, {}, lambda: NOON + self.clock.seconds())

        self.patch(api, "accessFor", lambda *_: access)
        self.patch(api, "Credentials", credentials)
        return self.source()

    def test_plugin(self) -> None:
        """From a plugin: one run for all kinds at each rotation, and at most one request of each is refused."""
        source = self.plugin()
        said: list[str] = []

        def answer(run: FakeProcess) -> None:
            ((token, _),) = (self.api.tokens or {}).items()
            said.append(token)
            left = LIFE - max(0.0, self.clock.seconds() - 1) % LIFE
            run.say(credential(token, expirationTimestamp=stamp(NOON + self.clock.seconds() + left))).end()

        self.clock.respond = answer
        self.rotates(source, False, 0)
        # A safety relist may come within the leeway before an end: the plugin is run, and has nothing newer yet.
        self.assertLessEqual(len(said) - len(set(said)), 1)
        self.assertGreaterEqual(len(said), 40)
