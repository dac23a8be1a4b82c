"""The table of ClientIP affinity."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.shared.policies import endpoint, endpoints
from twisted_kproxy.balance.affinity import AffinityTable


class AffinityTableTests(SynchronousTestCase):
    def test_unknownClient(self) -> None:
        """A client that never came belongs nowhere."""
        self.assertIsNone(AffinityTable(10, 60).find("192.0.2.1", 0.0))

    def test_slides(self) -> None:
        """Each use starts the time anew; without use it ends exactly when it is over."""
        table = AffinityTable(10, 60)
        table.bind("192.0.2.1", endpoint(1), 0.0)
        self.assertEqual(table.find("192.0.2.1", 59.9), endpoint(1))
        self.assertEqual(table.find("192.0.2.1", 119.8), endpoint(1))
        self.assertIsNone(table.find("192.0.2.1", 179.8))
        self.assertEqual(len(table), 0)

    def test_peek(self) -> None:
        """Who only looks does not start the time anew, and finds nothing that is over."""
        table = AffinityTable(10, 60)
        table.bind("192.0.2.1", endpoint(1), 0.0)
        self.assertEqual(table.peek("192.0.2.1", 59.9), endpoint(1))
        self.assertIsNone(table.peek("192.0.2.1", 60.0))
        self.assertIsNone(table.peek("192.0.2.2", 0.0))
        self.assertIsNone(table.find("192.0.2.1", 60.0))

    def test_longest(self) -> None:
        """A day is a day."""
        table = AffinityTable(10, 86400)
        table.bind("192.0.2.1", endpoint(1), 1000.0)
        self.assertEqual(table.find("192.0.2.1", 1000.0 + 86399), endpoint(1))

    def test_boundAnew(self) -> None:
        """A client has one binding, the newest."""
        table = AffinityTable(10, 60)
        table.bind("192.0.2.1", endpoint(1), 0.0)
        table.bind("192.0.2.1", endpoint(2), 1.0)
        self.assertEqual((table.find("192.0.2.1", 2.0), len(table)), (endpoint(2), 1))
        table.retain(endpoints(2))
        self.assertEqual(table.find("192.0.2.1", 2.0), endpoint(2))

    def test_full(self) -> None:
        """A full table gives up the client that was not seen for longest, and counts it."""
        table = AffinityTable(3, 60)
        for number in range(3):
            table.bind(f"192.0.2.{number}", endpoint(number), float(number))
        table.find("192.0.2.0", 3.0)
        table.bind("192.0.2.9", endpoint(9), 4.0)
        self.assertIsNone(table.find("192.0.2.1", 5.0))
        self.assertEqual(table.find("192.0.2.0", 5.0), endpoint(0))
        self.assertEqual((len(table), table.evicted), (3, 1))

    def test_flood(self) -> None:
        """However many clients come, the table does not outgrow its limit."""
        table = AffinityTable(1000, 86400)
        for number in range(5000):
            table.bind(f"client {number}", endpoint(number % 3), number * 0.001)
        self.assertEqual(len(table), 1000)

    def test_expiredMakesRoom(self) -> None:
        """What has expired goes as others come, before anybody is evicted and without being asked for."""
        table = AffinityTable(100, 60)
        for number in range(50):
            table.bind(f"old {number}", endpoint(1), 0.0)
        for number in range(50):
            table.bind(f"new {number}", endpoint(1), 100.0)
        self.assertEqual((len(table), table.evicted), (50, 0))

    def test_endpointLeaves(self) -> None:
        """Clients of one that left are free; all others stay, and their time runs on unchanged."""
        table = AffinityTable(100, 60)
        for number in range(30):
            table.bind(f"client {number}", endpoint(number % 3), 0.0)
        table.retain(endpoints(0, 2, 5))
        found = {number: table.find(f"client {number}", 59.0) for number in range(30)}
        self.assertEqual(
            found, {number: None if number % 3 == 1 else endpoint(number % 3) for number in range(30)}
        )

    def test_shorter(self) -> None:
        """A shorter time is in force at once, for those who came before too."""
        table = AffinityTable(10, 600)
        table.bind("192.0.2.1", endpoint(1), 0.0)
        table.bind("192.0.2.2", endpoint(1), 50.0)
        table.setSeconds(30, 60.0)
        self.assertIsNone(table.find("192.0.2.1", 60.0))
        self.assertEqual(table.find("192.0.2.2", 60.0), endpoint(1))

    def test_longer(self) -> None:
        """A longer time is in force at once, but what was over stays over."""
        table = AffinityTable(10, 30)
        table.bind("192.0.2.1", endpoint(1), 0.0)
        table.bind("192.0.2.2", endpoint(1), 20.0)
        table.setSeconds(600, 40.0)
        self.assertIsNone(table.find("192.0.2.1", 40.0))
        self.assertEqual(table.find("192.0.2.2", 500.0), endpoint(1))

    def test_count(self) -> None:
        """Only clients whose time is not over are counted."""
        table = AffinityTable(10, 30)
        table.bind("192.0.2.1", endpoint(1), 0.0)
        table.bind("192.0.2.2", endpoint(1), 20.0)
        self.assertEqual([table.count(now) for now in (20.0, 30.0, 50.0)], [2, 1, 0])
