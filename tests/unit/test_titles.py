"""The list of Kubernetes' end-to-end tests that are told as scenarios."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.integration.titles import LEFT_OUT, WANTED, titles


class TitlesTests(SynchronousTestCase):
    """Titles here and there are the same."""

    def setUp(self) -> None:
        self.wanted = [title for names in WANTED.values() for title in names]
        self.found = titles()

    def test_nothingMissing(self) -> None:
        """For each title there is a test, or a reason why there is none; never both."""
        missing = [title for title in self.wanted if (title in self.found) == (title in LEFT_OUT)]
        self.assertEqual(missing, [])
        self.assertTrue(all(len(reason) > 20 for reason in LEFT_OUT.values()))

    def test_nothingInvented(self) -> None:
        """No test claims, and no reason excuses, what is not in the list; nothing is in it twice."""
        self.assertEqual(sorted({*self.found, *LEFT_OUT} - set(self.wanted)), [])
        self.assertEqual(len(self.wanted), len(set(self.wanted)))

    def test_finds(self) -> None:
        """A scenario is found under each class that it runs in."""
        found = self.found["should serve a basic endpoint from pods"]
        self.assertEqual(len(found), 3)
        self.assertIn("tests.integration.test_e2e_services.NftablesServicesTests.test_basicEndpoint", found)
