"""Rules of the house that neither the type checker nor the linter knows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

import twisted_kproxy

PACKAGE = Path(twisted_kproxy.__file__).parent
ROOT = PACKAGE.parent

#: Whatever reads the time of day, as ``module.name``.
WALL_CLOCK = frozenset(
    (
        "time.time",
        "time.time_ns",
        "datetime.datetime.now",
        "datetime.datetime.utcnow",
        "datetime.datetime.today",
        "datetime.date.today",
    )
)
BLOCKING = frozenset(("time.sleep",))
#: Where the time of day may be read, and what for. Everything else runs on the reactor's monotonic clock.
WALL_CLOCK_ALLOWED = {
    "metrics.py": "timestamps in metrics",
    "userspace/accesslog.py": "timestamps in the access log",
    "web/status.py": "timestamps on the health pages",
    "sources/credentials.py": "credentials say by the time of day when they end",
}
#: Who may take the global reactor, and what for.
REACTOR_ALLOWED = {
    "tap.py": "the entry point, which gives it to everybody",
    "reactor.py": "it installs one, and gives it to the entry point",
}


def uses(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each thing that a module uses from elsewhere, its own names for it resolved."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        it: ast.AST = node
        while isinstance(it, ast.Attribute):
            parts.insert(0, it.attr)
            it = it.value
        if parts and isinstance(it, ast.Name) and it.id in names:
            yield node.lineno, ".".join([names[it.id], *parts])


def modules() -> Iterator[tuple[str, str]]:
    """Path within the package and text of each module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text("utf-8")


def found(forbidden: frozenset[str], allowed: frozenset[str] = frozenset()) -> list[str]:
    """Where one of these names is used."""
    return [
        f"{name}:{line}: {used}"
        for name, source in modules()
        if name not in allowed
        for line, used in sorted(set(uses(source)))
        if used in forbidden
    ]


class HouseTests(SynchronousTestCase):
    """The package as a whole."""

    def test_seesModules(self) -> None:
        """These tests look at the real thing."""
        names = [name for name, _ in modules()]
        self.assertIn("interfaces.py", names)
        self.assertIn("core/values.py", names)

    def test_usesAreSeen(self) -> None:
        """Forbidden things are found however they are imported."""
        for source in (
            "import time\ntime.time()",
            "import time as t\nclock = t.time",
            "from time import time\ntime()",
            "from time import time as now",
        ):
            self.assertIn("time.time", {used for _, used in uses(source)}, source)
        for source in ("import datetime\ndatetime.datetime.now()", "from datetime import datetime\ndatetime.now()"):
            self.assertIn("datetime.datetime.now", {used for _, used in uses(source)}, source)
        self.assertIn(
            "twisted.internet.reactor", {used for _, used in uses("def f():\n  from twisted.internet import reactor")}
        )
        self.assertNotIn("time.time", {used for _, used in uses("import time\ntime.monotonic()\nself.time.time()")})

    def test_monotonicClock(self) -> None:
        """Nothing but what is shown to people and machines elsewhere depends on the time of day."""
        self.assertEqual(found(WALL_CLOCK, frozenset(WALL_CLOCK_ALLOWED)), [])

    def test_nothingSleeps(self) -> None:
        """Nothing holds up the reactor by sleeping."""
        self.assertEqual(found(BLOCKING), [])

    def test_reactorIsPassed(self) -> None:
        """Only the entry point, and what installs it, takes the global reactor; everything else is given one."""
        self.assertEqual(found(frozenset(("twisted.internet.reactor",)), frozenset(REACTOR_ALLOWED)), [])

    def test_docstrings(self) -> None:
        """Every module says what it is for."""
        silent = [name for name, source in modules() if not (ast.get_docstring(ast.parse(source)) or "").strip()]
        self.assertEqual(silent, [])

    def test_namespaceFolders(self) -> None:
        """
        ``twisted/`` holds our drop-in and nothing else: an ``__init__.py`` there would replace Twisted's own when
        installed, and delete it when uninstalled.
        """
        folder = ROOT / "twisted"
        if not folder.is_dir():
            self.fail("the tests run from a checkout, beside the folder twisted/")
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
        self.assertEqual(files, {"plugins/kproxy_plugin.py"})
