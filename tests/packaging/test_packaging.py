"""
What is built, and what installing and removing it does to a machine with Twisted on it.

The drop-in lives in a folder that belongs to Twisted, so all of this is tried in a real virtual environment, filled
from the package index; it is built once for all tests and left as it was found by each.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from functools import cache
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from twisted_kproxy import __version__

ROOT = Path(__file__).resolve().parents[2]
DROPIN = "twisted/plugins/kproxy_plugin.py"
STEM = f"twisted_kproxy-{__version__}"
#: what is not part of a checkout, or no part of what is built
LEFT_OUT = shutil.ignore_patterns(
    ".git",
    ".venv",
    "build",
    "dist",
    "*.egg-info",
    "_trial_temp*",
    "__pycache__",
    "dropin.cache",
    ".*_cache",
    ".hypothesis",
    "_pump.*",
)
PUMP = "twisted_kproxy/userspace/engines/pump.c"
#: Says which engine is chosen; arguments: modules that are not to be found.
CHOOSES = """
import sys
for name in sys.argv[1:]:
    sys.modules[name] = None
from twisted.internet import reactor
from twisted_kproxy.userspace.engines.choose import chooseEngine
from twisted_kproxy.userspace.engines.poller import Poller
print(chooseEngine(reactor, Poller(reactor)).name)
"""
SECONDS = 600


def environ() -> dict[str, str]:
    """The environment without what would let a checkout be found that is not installed."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSAFEPATH", "PYTHONDONTWRITEBYTECODE")
    return {key: value for key, value in os.environ.items() if key not in dropped} | {"PYTHONNOUSERSITE": "1"}


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run to the end, without a shell and without input; what it prints is kept together."""
    return subprocess.run(
        [str(it) for it in command],
        cwd=cwd,
        env=environ(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )


def must(*command: str | Path, cwd: Path) -> str:
    """Run what has to succeed; what it printed."""
    done = run(*command, cwd=cwd)
    if done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


@cache
def workshop() -> Path:
    """A folder for all that is made here, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="kproxy-packaging-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "elsewhere").mkdir()
    return folder


@cache
def tree() -> Path:
    """A copy of the checkout, so that building leaves nothing in it."""
    return Path(shutil.copytree(ROOT, workshop() / "tree", ignore=LEFT_OUT))


@cache
def built() -> Path:
    """The folder with a source distribution, and the wheel that was built from it."""
    must(sys.executable, "-m", "build", "--no-isolation", "--outdir", workshop() / "dist", cwd=tree())
    return workshop() / "dist"


def wheel(folder: Path | None = None) -> Path:
    """The wheel, whose name tells for which Python and machine it is."""
    (found,) = (folder or built()).glob(f"{STEM}-*.whl")
    return found


@cache
def builtWithoutCompiler() -> Path:
    """The wheel of a machine where there is no compiler that works."""
    bare = Path(shutil.copytree(tree(), workshop() / "bare", ignore=LEFT_OUT))
    must("env", "CC=false", sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir",
         workshop() / "dist-bare", cwd=bare)  # fmt: skip
    return wheel(workshop() / "dist-bare")


def modules() -> set[str]:
    """The modules of the package, as paths from the root."""
    return {path.relative_to(tree()).as_posix() for path in (tree() / "twisted_kproxy").rglob("*.py")}


class Machine:
    """A virtual environment as an operator would make it, with everything that the wheel depends on."""

    def __init__(self) -> None:
        self.folder = workshop() / "machine"
        venv.create(self.folder, with_pip=True)
        self.python = self.folder / "bin" / "python"
        self.elsewhere = workshop() / "elsewhere"
        # The dependencies come by installing the wheel, from the index: a requirement that is not declared, or that
        # cannot be had, shows here.
        self.pip("install", wheel())
        self.first = self.twistd("kproxy", "--help")
        self.uninstall()
        self.site = Path(
            must(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=self.folder).strip()
        )
        self.bare = self.files()

    def pip(self, *arguments: str | Path) -> str:
        return must(self.python, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=self.elsewhere)

    def install(self, *what: str | Path) -> None:
        self.pip("install", "--no-deps", *what)

    def uninstall(self) -> None:
        self.pip("uninstall", "--yes", "twisted-kproxy")

    def twistd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return run(self.folder / "bin" / "twistd", *arguments, cwd=self.elsewhere)

    def files(self) -> set[str]:
        """All that is installed, without what Python and twistd cache."""
        return {
            path.relative_to(self.site).as_posix()
            for path in self.site.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and path.name != "dropin.cache"
        }


@cache
def machine() -> Machine:
    return Machine()


class BuildTests(SynchronousTestCase):
    """What wheel and source distribution contain."""

    def test_wheel(self) -> None:
        """
        The wheel holds every module, the C module and its source, the drop-in, its own facts, and nothing else: no
        tests, no ``__init__.py``.
        """
        with zipfile.ZipFile(wheel()) as archive:
            names = set(archive.namelist())
        facts = {name for name in names if name.startswith(f"{STEM}.dist-info/")}
        self.assertIn(f"{STEM}.dist-info/licenses/LICENSE", facts)
        native = {name for name in names if name.startswith("twisted_kproxy/userspace/engines/_pump.")}
        self.assertEqual([name.rpartition(".")[2] for name in native], ["so"])
        self.assertEqual(names - facts - native, modules() | {DROPIN, PUMP, "twisted_kproxy/py.typed"})

    def test_withoutCompiler(self) -> None:
        """Where no compiler works, the wheel is built all the same, with everything but the C module."""
        with zipfile.ZipFile(builtWithoutCompiler()) as archive:
            names = {name for name in archive.namelist() if ".dist-info/" not in name}
        self.assertEqual(names, modules() | {DROPIN, PUMP, "twisted_kproxy/py.typed"})

    def test_sdist(self) -> None:
        """The source distribution has all that is needed to build and test, and nothing that was made meanwhile."""
        with tarfile.open(built() / f"{STEM}.tar.gz") as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        wanted = modules() | {
            DROPIN, PUMP, "setup.py", "setup.cfg", "pyproject.toml", "README.rst", "LICENSE", "Makefile", ".ci/run",
            "etc/kproxy.ini", "etc/kproxy.service", "tests/packaging/test_packaging.py",
        }  # fmt: skip
        self.assertEqual(wanted - names, set())
        self.assertEqual(
            [name for name in names if "__pycache__" in name or name.endswith((".pyc", "dropin.cache"))], []
        )
        self.assertEqual([name for name in names if name.startswith("twisted/") and name.endswith("__init__.py")], [])


class InstallTests(SynchronousTestCase):
    """Each way to install it, in an environment that has Twisted."""

    def works(self) -> None:
        """twistd, anywhere on the machine, offers kproxy and can load it."""
        listed = machine().twistd("--help")
        self.assertEqual(listed.returncode, 0, listed.stdout)
        self.assertRegex(listed.stdout, r"(?m)^\s+kproxy\s+The node service proxy")
        shown = machine().twistd("kproxy", "--help")
        self.assertEqual(shown.returncode, 0, shown.stdout)
        self.assertIn("--config", shown.stdout)
        self.assertNotIn("Traceback", shown.stdout)

    def removed(self) -> None:
        """Uninstalling takes away what was installed, all of it and no more, and Twisted goes on working."""
        machine().uninstall()
        self.assertEqual(machine().files(), machine().bare)
        listed = machine().twistd("--help")
        self.assertEqual(listed.returncode, 0, listed.stdout)
        self.assertNotIn("kproxy", listed.stdout)
        self.assertRegex(listed.stdout, r"(?m)^\s+web\s")
        self.assertTrue((machine().site / "twisted/plugins/__init__.py").is_file())

    def tried(self, *what: str | Path) -> None:
        machine().install(*what)
        try:
            self.works()
        finally:
            self.removed()

    def test_withDependencies(self) -> None:
        """Installed with nothing but pip and the index, it runs: every dependency is declared."""
        self.assertEqual(machine().first.returncode, 0, machine().first.stdout)
        self.assertIn("--config", machine().first.stdout)

    def test_wheel(self) -> None:
        """The wheel."""
        self.tried(wheel())

    def engine(self, *missing: str) -> str:
        """Which engine is chosen where these modules are missing."""
        return must(machine().python, "-c", CHOOSES, *missing, cwd=machine().elsewhere).strip()

    def test_engine(self) -> None:
        """What was built with a compiler carries bytes in C; without what cffi needs at run time, in Python."""
        machine().install(wheel())
        try:
            self.assertEqual(self.engine(), "native")
            self.assertEqual(self.engine("_cffi_backend"), "python")
        finally:
            self.removed()

    def test_engineWithoutCompiler(self) -> None:
        """What was built without one works too, with the engine in Python."""
        machine().install(builtWithoutCompiler())
        try:
            self.works()
            self.assertEqual(self.engine(), "python")
        finally:
            self.removed()

    def test_wheelFiles(self) -> None:
        """In place of Twisted's, no file changes; in its folders there is one more, the drop-in."""
        machine().install(wheel())
        try:
            new = machine().files() - machine().bare
            self.assertEqual({name for name in new if name.startswith("twisted/")}, {DROPIN})
            self.assertEqual(machine().bare - machine().files(), set())
        finally:
            self.removed()

    def test_sdist(self) -> None:
        """The source distribution, built by pip in isolation: the build requirements are declared too."""
        self.tried(built() / f"{STEM}.tar.gz")

    def test_editable(self) -> None:
        """A checkout, editable: as a plain path, since twistd does not look for plug-ins where import hooks do."""
        machine().install("--editable", tree())
        try:
            lines = [
                line
                for path in machine().site.glob("*.pth")
                if "kproxy" in path.name
                for line in path.read_text().splitlines()
            ]
            self.assertEqual([Path(line).resolve() for line in lines], [tree().resolve()])
            self.works()
        finally:
            self.removed()
        self.assertTrue((tree() / DROPIN).is_file())

    def test_allImport(self) -> None:
        """Every module can be imported with the declared dependencies alone."""
        machine().install(wheel())
        try:
            names = sorted(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in modules())
            program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
            must(machine().python, "-c", program, *names, cwd=machine().elsewhere)
        finally:
            self.removed()


class CheckoutTests(SynchronousTestCase):
    """The checkout itself."""

    def test_noInitInTwisted(self) -> None:
        """There is no ``__init__.py`` in ``twisted/``: a wheel with one would replace, and then delete, Twisted's."""
        self.assertEqual(list((ROOT / "twisted").rglob("__init__.py")), [])
        self.assertTrue((ROOT / DROPIN).is_file())

    def test_metadataInOnePlace(self) -> None:
        """pyproject.toml has no project table: beside setup.cfg's metadata the build would fail or choose."""
        self.assertNotIn("project", tomllib.loads((ROOT / "pyproject.toml").read_text()))
