"""The documentation as others render it."""

from __future__ import annotations

import io
import re
from pathlib import Path

import yaml
from docutils.core import publish_doctree
from docutils.nodes import reference
from twisted.trial.unittest import SynchronousTestCase

import twisted_kproxy

ROOT = Path(twisted_kproxy.__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.rst"), *ROOT.glob("docs/*.rst")])
#: a page that is named as code, though it could be a link
NAMED = re.compile(r"(?<!`)``(?:docs/)?[a-z-]+\.rst``(?!`)")


class DocsTests(SynchronousTestCase):
    """Every page."""

    def test_render(self) -> None:
        """Each renders without a word of complaint, and what it links to in this checkout is there."""
        self.assertIn(ROOT / "README.rst", PAGES)
        for page in PAGES:
            said = io.StringIO()
            settings = {"report_level": 1, "halt_level": 5, "warning_stream": said}
            tree = publish_doctree(page.read_text("utf-8"), str(page), settings_overrides=settings)
            self.assertEqual(said.getvalue(), "")
            targets = {it["refuri"] for it in tree.findall(reference) if "refuri" in it}
            for target in sorted(it for it in targets if ":" not in it):
                self.assertTrue((page.parent / target.partition("#")[0]).is_file(), f"{page.name}: {target}")

    def test_heredocs(self) -> None:
        """What is to be pasted into kubectl is block YAML: a text that begins with a brace it takes for JSON."""
        found = 0
        for page in PAGES:
            for text in re.findall(r"<<(?:EOF|END)\n(.*?)\n +(?:EOF|END)\n", page.read_text("utf-8"), re.DOTALL):
                documents = list(yaml.safe_load_all(text))
                self.assertTrue(all("kind" in it for it in documents), text)
                self.assertFalse(text.lstrip().startswith("{"), text)
                found += 1
        self.assertGreaterEqual(found, 2)

    def test_links(self) -> None:
        """Pages are named by links."""
        for page in PAGES:
            lines = page.read_text("utf-8").splitlines()
            self.assertEqual([f"{page.name}: {it}" for it in lines if NAMED.search(it)], [])
