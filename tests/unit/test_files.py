"""Manifests in a folder as a source."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred, execute
from twisted.internet.task import Clock
from twisted.logger import globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase, TestCase

from tests.shared import sources
from tests.shared.sources import Words, manifest
from twisted_kproxy.core.values import Change, Rejected, Replaced
from twisted_kproxy.sources import manifests, scan
from twisted_kproxy.sources.files import FilesSource, faultsOf
from twisted_kproxy.sources.manifests import Broken, parse

RECORDED = Path(__file__).parents[1] / "fixtures" / "apiserver"
POLL = 5.0
TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("\n\té"), max_size=12)


class Where(msgspec.Struct, frozen=True):
    path: str
    pollSeconds: float = POLL
#: what a manifest of a Service begins with
HEAD = "apiVersion: v1\nkind: Service\nspec: {}\n"


def service(name: str, port: Any = 80, **meta: Any) -> str:
    """A Service of ``shop`` as YAML."""
    return yaml.safe_dump({**manifest(name, port=port), "metadata": {"name": name, "namespace": "shop", **meta}})


class Rig:
    """A folder, a clock, and a source that looks at the one by the other."""

    def __init__(self, folder: str, path: str = "") -> None:
        self.folder = folder
        self.clock = Clock()
        self.words = Words()
        self.source = FilesSource(self.clock, "local", Where(path or folder), self.words, execute, nodeName="n")

    def write(self, name: str, text: str | bytes) -> None:
        """Put a finished file into place."""
        path = os.path.join(self.folder, name)
        with open(f"{path}~", "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
        os.rename(f"{path}~", path)

    def unlink(self, name: str) -> None:
        os.unlink(os.path.join(self.folder, name))

    def poll(self) -> list[Any]:
        """Let the next look come; what was said of it."""
        before = len(self.words.said)
        self.clock.advance(POLL)
        self.clock.advance(0)
        return self.words.said[before:]

    def put(self, manifest: dict[str, Any]) -> None:
        meta = manifest["metadata"]
        self.write(f"{manifest['kind']}-{meta['namespace']}-{meta['name']}.yaml", yaml.safe_dump(manifest))
        self.poll()

    def remove(self, kind: str, key: str) -> None:
        self.unlink(f"{kind}-{key.replace('/', '-')}.yaml")
        self.poll()


class FilesSuiteTests(sources.SourceSuite):
    """What every source promises."""

    def makeRig(self) -> Rig:
        folder = self.mktemp()
        os.mkdir(folder)
        return Rig(os.path.abspath(folder))


class FolderCase(SynchronousTestCase):
    """A rig on a new folder, and the log."""

    def setUp(self) -> None:
        self.folder = os.path.abspath(self.mktemp())
        os.mkdir(self.folder)
        self.rig = Rig(self.folder)
        self.logged: list[str] = []
        globalLogPublisher.addObserver(self.observe)
        self.addCleanup(globalLogPublisher.removeObserver, self.observe)
        self.addCleanup(self.stop)

    def observe(self, event: dict[str, Any]) -> None:
        if "source" in event:
            self.logged.append(str(event.get("note") or event.get("trouble") or event["log_format"]))

    def stop(self) -> None:
        if self.rig.source.running:
            self.successResultOf(self.rig.source.stopService())
        self.assertEqual(self.rig.clock.getDelayedCalls(), [])

    def start(self, **files: str) -> None:
        for name, text in files.items():
            self.rig.write(f"{name}.yaml", text)
        self.rig.source.startService()

    def services(self) -> list[str]:
        return sorted(self.rig.words.state.get("Service", {}))

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)


class RecordedTests(SynchronousTestCase):
    """What real API servers gave out, as files."""

    def subset(self, got: Any, said: Any, where: str) -> None:
        """Everything that was decoded stands in the file."""
        if isinstance(got, dict):
            for key, value in got.items():
                if value is not None:
                    self.assertIn(key, said, where)
                    self.subset(value, said[key], f"{where}.{key}")
        elif isinstance(got, list):
            self.assertEqual(len(got), len(said), where)
            for index, (one, other) in enumerate(zip(got, said, strict=True)):
                self.subset(one, other, f"{where}[{index}]")
        else:
            self.assertEqual(got, said, where)

    def test_everyFile(self) -> None:
        """Every recorded manifest is read without a fault, and each object is what its file says."""
        paths = sorted(RECORDED.glob("*/manifests/*.yaml"))
        self.assertGreater(len(paths), 100)
        for path in paths:
            read = parse(path.read_bytes())
            self.assertEqual((read.faults, read.skipped), ((), {}), path.name)
            loaded = yaml.safe_load(path.read_text())
            said = loaded["items"] if loaded["kind"] == "List" else [loaded]
            self.assertEqual(len(read.found), len(said), path.name)
            for found, it in zip(read.found, said, strict=True):
                meta = it["metadata"]
                self.assertEqual(found.kind, it["kind"])
                inside = f"{meta['namespace']}/" if "namespace" in meta else ""
                self.assertEqual(found.key, f"{inside}{meta['name']}")
                self.subset(msgspec.to_builtins(found.object), it, f"{path.name} {found.key}")
                decoded = msgspec.to_builtins(found.object)
                for part in ("spec", "ports", "endpoints", "subsets"):
                    if it.get(part):
                        self.assertTrue(decoded[part], f"{path.name} {found.key} {part}")

    def test_wholeFolder(self) -> None:
        """A folder of single files and a folder with one list say the same, from YAML as from JSON."""
        for version in ("v1.20", "v1.36"):
            folder = RECORDED / version / "manifests"
            texts = {path.name: path.read_bytes() for path in folder.glob("*.yaml")}
            whole = texts.pop("all-list.yaml")
            texts.pop("endpoints-edge-mirrored.yaml", None)  # made by hand; the recorded list has none of its kind
            said = []
            asJSON = json.dumps(yaml.safe_load(whole), indent=2).encode()
            for files in (texts, {"all.yaml": whole}, {"all.json": asJSON}):
                path = self.mktemp()
                os.mkdir(path)
                rig = Rig(os.path.abspath(path))
                for name, text in files.items():
                    rig.write(name, text)
                rig.source.startService()
                self.assertEqual(rig.source.status()["rejected"], 0)
                said.append({kind: dict(found) for kind, found in rig.words.state.items()})
                self.successResultOf(rig.source.stopService())
            self.assertGreater(len(said[0]["Service"]), 10)
            self.assertEqual(said[0], said[1])
            self.assertEqual(said[0], said[2])


class FilesTests(FolderCase):
    """What is said when files come, change and go."""

    def test_whichFiles(self) -> None:
        """Only manifests count: no hidden files, no editor's leftovers, no subfolders, no other endings."""
        os.mkdir(self.path("sub.yaml"))
        names = ("a.yaml", "b.yml", ".h.yaml", ".#l.yaml", "#a.yaml", "a.yaml~", "a.txt", "sub.yaml/x.yaml")
        for number, name in enumerate(names):
            self.rig.write(name, service(f"s{number}"))
        self.rig.write("c.json", json.dumps(manifest("j")))
        self.start()
        self.assertEqual(self.services(), ["shop/j", "shop/s0", "shop/s1"])
        self.assertEqual(self.logged, [])

    def test_emptyFolder(self) -> None:
        """An empty folder says that there is nothing of any kind."""
        self.start()
        self.assertEqual(self.rig.words.said, [Replaced("local", kind, {}) for kind in self.rig.source.kinds])
        self.assertEqual(self.rig.source.ages()["Service"], 0.0)

    def missing(self) -> None:
        """Nothing is said of the path, and everybody is told, once."""
        source = self.rig.source
        self.start()
        self.rig.poll()
        self.assertEqual(self.rig.words.said, [])
        self.assertEqual(source.ages()["Service"], None)
        (line,) = self.logged
        path = source.status()["path"]
        self.assertEqual(dict(source.faults()), {path: line.removeprefix(path).lstrip(": ")})
        self.assertEqual((source.status()["error"], source.status()["broken"]), (line, {}))

    def test_missingFolder(self) -> None:
        """A folder that is missing has not been read, and is no empty one; when it appears, all of it is said."""
        os.rmdir(self.folder)
        self.missing()
        self.assertEqual(
            self.logged, [f"{self.folder} does not exist; until it has been read, rules stay as they are"]
        )
        self.assertEqual(self.rig.source.status()["state"], "missing")
        os.mkdir(self.folder)
        self.rig.write("a.yaml", service("web"))
        words = self.rig.poll()
        self.assertEqual([(type(it), it.kind) for it in words], [(Replaced, kind) for kind in self.rig.source.kinds])
        self.assertEqual(self.services(), ["shop/web"])
        self.assertEqual(self.logged[1:], ["Source {source}: {path} can be read now"])
        self.assertEqual(self.rig.source.status()["state"], "in agreement")
        self.assertEqual(dict(self.rig.source.faults()), {})

    def test_missingFile(self) -> None:
        """The same of a single file; an empty one says that there is nothing."""
        self.rig = Rig(self.folder, self.path("all.yaml"))
        self.missing()
        self.rig.write("all.yaml", "")
        self.assertEqual(self.rig.poll(), [Replaced("local", kind, {}) for kind in self.rig.source.kinds])

    def test_unreadableFolder(self) -> None:
        """The same of a folder that may not be read."""
        real = os.listdir

        def listdir(path: str) -> list[str]:
            if path == self.folder:
                raise PermissionError(13, "Permission denied")
            return real(path)

        self.patch(os, "listdir", listdir)
        self.missing()
        self.assertIn("cannot be read: Permission denied; until", self.logged[0])
        self.assertEqual(self.rig.source.status()["state"], "trouble")
        self.patch(os, "listdir", real)
        self.assertEqual(len(self.rig.poll()), len(self.rig.source.kinds))

    def test_vanishedFolder(self) -> None:
        """A folder that goes away is a loss of contact: what was said stays, and its age grows."""
        self.start(a=service("web"))
        os.rename(self.folder, f"{self.folder}.gone")
        self.assertEqual(self.rig.poll(), [])
        self.assertEqual(self.rig.source.ages()["Service"], POLL)
        self.assertIn("its 1 object stays in force", self.logged[-1])
        self.assertEqual(dict(self.rig.source.faults()), {self.folder: "does not exist; its 1 object stays in force"})
        self.assertEqual(self.rig.source.status()["state"], "missing")
        os.rename(f"{self.folder}.gone", self.folder)
        self.assertEqual(self.rig.poll(), [])
        self.assertEqual(self.rig.source.ages()["Service"], 0.0)

    def test_oneFile(self) -> None:
        """The path may be one file, whatever its ending; when it is removed, its objects go."""
        self.rig = Rig(self.folder, self.path("all.conf"))
        self.rig.write("all.conf", service("web"))
        self.rig.write("other.yaml", service("other"))
        self.start()
        self.assertEqual(self.services(), ["shop/web"])
        self.rig.unlink("all.conf")
        self.assertEqual(self.rig.poll(), [Change("local", "Service", "shop/web", None)])
        self.rig.write("all.conf", service("db"))
        self.rig.poll()
        self.assertEqual(self.services(), ["shop/db"])

    def test_serviceCidrs(self) -> None:
        """A ServiceCIDR is in no namespace; one of another project's group is passed over."""
        cidr = "kind: ServiceCIDR\nmetadata: {name: %s, namespace: odd}\nspec: {cidrs: [10.96.0.0/16]}\n"
        documents = [f"apiVersion: {group}/v1\n{cidr % name}" for group, name in (
            ("networking.k8s.io", "kubernetes"), ("networking.example", "other"),
        )]
        self.start(a="---\n".join(documents))
        self.assertEqual(list(self.rig.words.state["ServiceCIDR"]), ["kubernetes"])
        self.assertEqual(self.rig.words.state["ServiceCIDR"]["kubernetes"].spec.cidrs, ["10.96.0.0/16"])
        self.rig.unlink("a.yaml")
        self.assertEqual(self.rig.poll(), [Change("local", "ServiceCIDR", "kubernetes", None)])

    def test_minimal(self) -> None:
        """Of a file with many objects, only what has changed is said; touching it or moving objects says nothing."""
        docs = [service(f"s{number}") for number in range(5)]
        self.start(a="---\n".join(docs))
        docs[3] = service("s3", 81)
        self.rig.write("a.yaml", "---\n".join(docs))
        (word,) = self.rig.poll()
        self.assertEqual((word.key, word.object.spec.ports[0].port), ("shop/s3", 81))
        self.rig.write("a.yaml", "---\n".join(reversed(docs)))
        self.assertEqual(self.rig.poll(), [])
        self.rig.unlink("a.yaml")
        self.rig.write("b.yaml", "---\n".join(docs))
        self.assertEqual(self.rig.poll(), [])

    def test_namespaces(self) -> None:
        """An object without namespace is in default; a Node is in none."""
        node = "apiVersion: v1\nkind: Node\nmetadata: {name: n1, namespace: odd}\n"
        self.start(a="apiVersion: v1\nkind: Service\nspec: {}\nmetadata: {name: web}\n", b=node)
        self.assertEqual(self.services(), ["default/web"])
        self.assertEqual(self.rig.words.state["Service"]["default/web"].metadata.namespace, "default")
        self.assertEqual(list(self.rig.words.state["Node"]), ["n1"])

    def test_otherKinds(self) -> None:
        """What a service proxy does not read is skipped, with one line for a file."""
        text = "---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\n" * 3
        text += "---\napiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: k}\n---\n" + service("web")
        self.start(a=text)
        self.assertEqual(self.services(), ["shop/web"])
        expected = "4 objects are not for us: Deployment, Service.serving.knative.dev/v1"
        self.assertEqual(self.logged, [f"{self.path('a.yaml')}: {expected}"])

    def test_oneOtherKind(self) -> None:
        """One is no plural."""
        self.start(a=yaml.safe_dump({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}}))
        self.assertEqual(self.logged, [f"{self.path('a.yaml')}: 1 object is not for us: Deployment"])

    def test_misspelledKind(self) -> None:
        """A kind that is nearly one of ours is a fault, also for ``--check``; a neighbour of that name is not."""
        for kind, meant in (
            ("Servcie", "Service"), ("service", "Service"), ("Services", "Service"), ("Endpoint", "Endpoints"),
            ("EndpointSlices", "EndpointSlice"), ("Nodes", "Node"), ("ServiceCidr", "ServiceCIDR"), ("Lists", "List"),
            ("ServciesList", "ServiceList"),
        ):  # fmt: skip
            for head in ("apiVersion: v1\n", ""):
                read = parse(f"{head}kind: {kind}\nmetadata: {{name: x}}\nitems: []\n".encode())
                self.assertEqual(read.faults, ((1, f"kind {kind} is not known; did you mean {meant!r}?"),))
                self.assertEqual((read.loose, read.skipped), (read.faults, {}))
        for kind, version in (
            ("ServiceAccount", "v1"), ("Secret", "v1"), ("Pod", "v1"), ("PodList", "v1"),
            ("Ingress", "networking.k8s.io/v1"),
            ("IngressClass", "networking.k8s.io/v1"), ("IPAddress", "networking.k8s.io/v1"), ("ServiceMonitor", "x/v1"),
            ("ServiceSet", "example/v1"), ("Services", "example/v1"),
        ):  # fmt: skip
            read = parse(f"kind: {kind}\napiVersion: {version}\n".encode())
            self.assertEqual((read.faults, read.skipped), ((), {kind: 1}))
        self.start(a="apiVersion: v1\nkind: Servcie\nmetadata: {name: x}\n")
        expected = f"{self.path('a.yaml')}:1: kind Servcie is not known; did you mean 'Service'?"
        self.assertEqual((self.logged, faultsOf(self.folder)), ([expected], [expected]))

    def test_brokenFile(self) -> None:
        """A file that is no YAML keeps its last good content; file, line and reason are logged once."""
        self.start(a=service("web"), b=service("db"))
        self.rig.write("a.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: web\nspec: 1\n")
        self.rig.write("b.yaml", service("db2"))
        self.rig.poll()
        self.rig.poll()
        self.assertEqual(self.services(), ["shop/db2", "shop/web"])
        (line,) = self.logged
        self.assertTrue(line.startswith(f"{self.path('a.yaml')}:4: is no YAML: "), line)
        self.assertTrue(line.endswith("; its last good content of 1 object stays"), line)
        self.assertTrue(self.rig.source.status()["broken"]["a.yaml"].startswith("line 4: is no YAML: "))
        self.assertEqual((list(self.rig.source.faults()), self.rig.source.status()["state"]), (["a.yaml"], "trouble"))
        self.rig.write("a.yaml", service("web", 81))
        (word,) = self.rig.poll()
        self.assertEqual(word.object.spec.ports[0].port, 81)
        self.assertEqual(self.rig.source.status()["broken"], {})

    def test_noVersion(self) -> None:
        """An object that says no version any more, or a wrong one, keeps its last good version."""
        good = service("web")
        self.start(a=good)
        for version, reason in (("", "apiVersion is missing; it must be v1"), ("apiVersion: v1x\n", "must be v1")):
            self.rig.write("a.yaml", good.replace("apiVersion: v1\n", version))
            (word,) = self.rig.poll()
            assert isinstance(word, Rejected)
            self.assertEqual((word.kind, word.key), ("Service", "shop/web"))
            self.assertIn(reason, word.reason)
            self.assertEqual((self.services(), dict(self.rig.source.faults())), (["shop/web"], {}))
            self.rig.write("a.yaml", good)
            self.rig.poll()
            self.assertEqual(self.services(), ["shop/web"])

    def test_looseFaults(self) -> None:
        """What is wrong in a file and is no object with a name is a fault of the source, until it is mended."""
        unnamed = "---\napiVersion: v1\nkind: Service\nmetadata: {}\n"
        self.start(
            a=service("web") + "---\nkind: Service\nmetadata: {name: nov}\n--- text\n" + unnamed,
            b=service("bad", "eighty"),
            c=service("web") + "---\n" + service("db") + "---\n" + service("db"),
        )
        lines = service("web").count("\n")
        self.assertEqual(
            dict(self.rig.source.faults()),
            {
                f"a.yaml:{lines + 4}": "is no object but text",
                f"a.yaml:{lines + 6}": "Service: it has no metadata.name",
                "c.yaml:1": "Service shop/web is also in a.yaml, which counts: remove one",
                f"c.yaml:{2 * lines + 3}": f"Service shop/db: is already on line {lines + 2}, which counts",
            },
        )
        self.assertEqual(list(self.rig.words.state["Service"]), ["shop/web", "shop/db"])
        self.rig.write("a.yaml", "[")  # its lines are told no more, but the object that it had stays
        self.rig.poll()
        self.assertEqual([it for it in self.rig.source.faults() if it.startswith("a")], ["a.yaml"])
        self.assertIn("c.yaml:1", self.rig.source.faults())
        self.rig.write("a.yaml", service("web"))
        self.rig.write("c.yaml", service("db"))
        self.rig.poll()
        self.assertEqual(dict(self.rig.source.faults()), {})

    def test_looseFaultsOfLostFolder(self) -> None:
        """They stay while the folder is away, as all does."""
        self.start(a="5")
        os.rename(self.folder, f"{self.folder}.gone")
        self.rig.poll()
        self.assertEqual(list(self.rig.source.faults()), [self.folder, "a.yaml:1"])
        os.rename(f"{self.folder}.gone", self.folder)
        self.rig.poll()
        self.assertEqual(dict(self.rig.source.faults()), {"a.yaml:1": "is no object but a number"})

    def test_looseFaultsOnOneLine(self) -> None:
        """Several on one line share their place."""
        self.rig.write("l.json", json.dumps({"kind": "List", "apiVersion": "v1", "items": [1, "x"]}))
        self.start()
        expected = {"l.json:1": "is no object but a number; is no object but text"}
        self.assertEqual(dict(self.rig.source.faults()), expected)

    def test_manyLooseFaults(self) -> None:
        """Only so many are told; how many more there are is the last of them."""
        self.start(a="--- 5\n" * 15, b="--- 5\n" * 15)
        faults = dict(self.rig.source.faults())
        self.assertEqual(list(faults)[:3], ["a.yaml:1", "a.yaml:2", "a.yaml:3"])
        self.assertEqual(list(faults)[-2:], ["b.yaml:5", "b.yaml:6"])
        self.assertEqual(faults["b.yaml:6"], "10 more faults from here on are left out")

    def test_mended(self) -> None:
        """A file that has no fault any more is told of, once; one that has gone, or has others, is not."""
        bad = service("x") + "--- 5\n"
        self.start(a="[", b=service("bad", "eighty"), c=service("web"), d=service("web"), e="[", f=bad, g="--- 6\n")
        self.logged.clear()
        self.rig.write("a.yaml", service("a"))
        self.rig.write("b.yaml", service("bad"))
        self.rig.write("d.yaml", service("d"))
        self.rig.write("e.yaml", "--- 5\n")
        self.rig.write("f.yaml", bad + "# the same\n")
        self.rig.unlink("g.yaml")
        self.rig.poll()
        self.assertEqual(
            self.logged,
            [
                f"{self.path('e.yaml')}:1: is no object but a number",
                f"{self.path('a.yaml')}: can be read again",
                f"{self.path('b.yaml')}: has no fault any more",
                f"{self.path('d.yaml')}: has no fault any more",
            ],
        )
        self.rig.poll()
        self.assertEqual(len(self.logged), 4)

    def test_brokenAtStart(self) -> None:
        """A file that was never good costs the others nothing."""
        self.start(a="[", b=service("db"))
        self.assertEqual(self.services(), ["shop/db"])
        self.assertEqual(len(self.logged), 1)

    def test_brokenThenRemoved(self) -> None:
        """A broken file that is removed takes the content with it that it had when it was good."""
        self.start(a=service("web"))
        self.rig.write("a.yaml", "[")
        self.assertEqual(self.rig.poll(), [])
        self.rig.unlink("a.yaml")
        self.assertEqual(self.rig.poll(), [Change("local", "Service", "shop/web", None)])

    def test_badObject(self) -> None:
        """An object that cannot be read is rejected by name; the line is where its document begins."""
        self.start(a=service("web") + "---\n" + service("bad"))
        self.rig.write("a.yaml", service("web") + "---\n" + service("bad", "eighty"))
        (word,) = self.rig.poll()
        assert isinstance(word, Rejected)
        self.assertEqual((word.kind, word.key), ("Service", "shop/bad"))
        self.assertEqual(word.reason, "spec.ports[0].port must be a number, and is text")
        line = service("web").count("\n") + 2
        self.assertEqual(len(self.logged), 1)
        self.assertIn(f"{self.path('a.yaml')}:{line}: Service shop/bad: {word.reason}", self.logged[0])
        self.assertEqual(self.rig.source.status()["rejected"], 1)
        self.rig.write("a.yaml", service("web", 81) + "---\n" + service("bad", "eighty"))
        self.assertEqual([word.key for word in self.rig.poll()], ["shop/web"])  # the same reason is not said again
        self.rig.write("a.yaml", service("web", 81) + "---\n" + service("bad"))
        (word,) = self.rig.poll()
        self.assertEqual((type(word), word.key), (Change, "shop/bad"))

    def test_badRemoved(self) -> None:
        """A rejected object that is removed goes, with its last good version."""
        self.start(a=service("web"))
        self.rig.write("a.yaml", service("web", "eighty"))
        self.rig.poll()
        self.rig.write("a.yaml", "")
        self.assertEqual(self.rig.poll(), [Change("local", "Service", "shop/web", None)])

    def test_namelessPort(self) -> None:
        """A port of a slice without a name has the empty one, as if an API server had completed it."""
        slice_ = {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4"}
        for port in ({"port": 8080}, {"port": 8080, "name": None}, {"port": 8080, "name": ""}):
            text = json.dumps({**slice_, "metadata": {"name": "web-1"}, "ports": [port]}).encode()
            for isJSON in (False, True):
                (found,) = parse(text, isJSON).found
                self.assertEqual(found.object.ports[0].name, "", port)
        (found,) = parse(json.dumps({**slice_, "metadata": {"name": "web-1"}, "ports": 5}).encode()).found
        self.assertEqual(found.reason, "ports must be a list, and is a number")

    def test_sameKeyTwice(self) -> None:
        """Of an object in two files the first by name counts; the other takes over when that one goes."""
        self.start(b=service("web", 2), a=service("web", 1), c=service("web", 3))
        self.assertEqual(self.rig.words.state["Service"]["shop/web"].spec.ports[0].port, 1)
        expected = f"{self.path('b.yaml')}: Service shop/web is also in a.yaml, which counts: remove one"
        self.assertEqual(self.logged, [expected])
        self.rig.poll()
        self.assertEqual(len(self.logged), 1)
        self.rig.unlink("a.yaml")
        (word,) = self.rig.poll()
        self.assertEqual(word.object.spec.ports[0].port, 2)

    def test_sameKeyInOneFile(self) -> None:
        """Of an object that stands twice in a file the first counts, with a line in the log."""
        self.start(a=service("web", 1) + "---\n" + service("web", 2))
        self.assertEqual(self.rig.words.state["Service"]["shop/web"].spec.ports[0].port, 1)
        self.assertIn("Service shop/web: is already on line 1, which counts", self.logged[0])

    def test_configMap(self) -> None:
        """The exchange of a mounted ConfigMap, a link to a hidden folder, is one change."""
        for number in (1, 2):
            os.mkdir(self.path(f"..{number}"))
            self.rig.write(f"..{number}/web.yaml", service("web", number))
        os.symlink("..1", self.path("..data"))
        os.symlink("..data/web.yaml", self.path("web.yaml"))
        self.start()
        self.assertEqual(self.rig.words.state["Service"]["shop/web"].spec.ports[0].port, 1)
        os.symlink("..2", self.path("..tmp"))
        os.rename(self.path("..tmp"), self.path("..data"))
        (word,) = self.rig.poll()
        self.assertEqual(word.object.spec.ports[0].port, 2)

    def test_exchangedFolder(self) -> None:
        """The folder may itself be a link that is led elsewhere."""
        os.mkdir(self.path("one"))
        os.mkdir(self.path("two"))
        self.rig.write("one/a.yaml", service("web"))
        self.rig.write("two/a.yaml", service("db"))
        os.symlink("one", self.path("now"))
        self.rig.source = FilesSource(self.rig.clock, "local", Where(self.path("now")), self.rig.words, execute)
        self.start()
        os.symlink("two", self.path("next"))
        os.rename(self.path("next"), self.path("now"))
        self.rig.poll()
        self.assertEqual(self.services(), ["shop/db"])

    def test_deadLink(self) -> None:
        """A link that leads nowhere keeps the content that it led to."""
        self.rig.write("target", service("web"))
        os.symlink("target", self.path("a.yaml"))
        self.start()
        self.rig.unlink("target")
        self.assertEqual(self.rig.poll(), [])
        self.assertEqual(self.rig.poll(), [])
        self.assertEqual(len(self.logged), 1)
        self.assertIn("a.yaml: cannot be read: is a link to nothing; its last good content", self.logged[0])
        self.rig.write("target", service("web", 81))
        self.assertEqual(len(self.rig.poll()), 1)

    def test_pipe(self) -> None:
        """A named pipe in the folder is not waited for."""
        os.mkfifo(self.path("a.yaml"))
        self.start(b=service("web"))
        self.assertEqual(self.services(), ["shop/web"])
        self.assertIn("a.yaml: is no regular file", self.logged[0])

    def test_beingWritten(self) -> None:
        """A file that changes while it is read is read again soon, and until then counts as before."""
        self.start(a=service("web"))
        real = scan._bytes
        reads = []

        def changing(path: str) -> Any:
            data, signature = real(path)
            reads.append(path)
            return (b"", (0, 0, 0, 0)) if len(reads) < 3 else (data, signature)

        self.patch(scan, "_bytes", changing)
        self.rig.write("a.yaml", service("web", 81))
        self.assertEqual(self.rig.poll(), [])
        self.rig.clock.advance(0.1)
        self.assertEqual(self.rig.words.state["Service"]["shop/web"].spec.ports[0].port, 80)
        self.rig.clock.advance(0.1)
        self.assertEqual(self.rig.words.state["Service"]["shop/web"].spec.ports[0].port, 81)

    def test_writtenAtStart(self) -> None:
        """The first words wait for a file that is being written, but not for ever."""
        self.patch(scan, "_bytes", lambda path: (b"", (0, 0, 0, 0)))
        self.start(a=service("web"))
        self.assertEqual(self.rig.words.said, [])
        self.rig.clock.pump([0.1] * 10)
        self.assertEqual(len(self.rig.words.said), len(self.rig.source.kinds))

    def test_manyFaults(self) -> None:
        """A folder full of faults does not fill the log."""
        self.start(a="---\n".join(service(f"s{number}", "x") for number in range(500)))
        self.assertEqual(len(self.logged), scan.MOST_NOTES + 1)
        self.assertIn("480 more such lines are left out", self.logged[-1])
        self.assertEqual(len(self.rig.words.rejected["Service"]), 500)

    def test_slices(self) -> None:
        """Thousands of changes are said over many turns of the reactor; a change meanwhile is seen after them."""
        self.start()
        self.rig.write("a.yaml", "---\n".join(service(f"s{number}") for number in range(1200)))
        turns: list[int] = []
        say = self.rig.source._say

        def counted() -> None:
            before = len(self.rig.words.said)
            say()
            turns.append(len(self.rig.words.said) - before)
            if len(turns) == 1:
                self.rig.write("a.yaml", service("s1"))
                self.rig.source._noticed("a.yaml")

        self.patch(self.rig.source, "_say", counted)
        self.rig.clock.advance(POLL)
        self.assertEqual(turns, [500, 500, 200])
        self.rig.clock.advance(0.1)
        self.assertEqual(self.services(), ["shop/s1"])

    def test_stopWhileSaying(self) -> None:
        """Once it is stopped nothing more is said, though words were left."""
        self.start()
        self.rig.write("a.yaml", "---\n".join(service(f"s{number}") for number in range(1200)))
        say = self.rig.words.say
        said = len(self.rig.words.said)

        def stopping(word: Any) -> None:
            say(word)
            if len(self.rig.words.said) == said + 300:
                self.rig.source.stopService()

        self.patch(self.rig.words, "say", stopping)
        self.rig.clock.advance(POLL)
        self.rig.clock.pump([1] * 20)
        self.assertEqual(len(self.rig.words.said), said + 300)

    def test_failingThread(self) -> None:
        """An error of the thread is logged and the next look comes."""
        answers: list[Callable[..., Deferred[Any]]] = [execute]
        rig = self.rig

        def run(function: Callable[..., Any], *args: Any) -> Deferred[Any]:
            return answers[-1](function, *args)

        rig.source = FilesSource(rig.clock, "local", Where(self.folder), rig.words, run)
        self.start(a=service("web"))
        answers.append(lambda f, *a: execute(lambda: 1 / 0))
        self.assertEqual(rig.poll(), [])
        self.assertIn("cannot look at", rig.source.status()["error"])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        answers.append(execute)
        rig.write("a.yaml", service("db"))
        self.assertEqual(len(rig.poll()), 2)
        self.assertEqual(rig.source.status()["error"], "")

    def test_noticed(self) -> None:
        """Of what the kernel tells, only what may matter leads to a look; a burst leads to one."""
        looks = []
        rig = self.rig
        rig.source = FilesSource(
            rig.clock, "local", Where(self.folder), rig.words, lambda f, *a: looks.append(1) or execute(f, *a)
        )
        self.start()
        for name in (".a.yaml.swp", "4913", "a.txt", "b.yaml~"):
            rig.source._noticed(name)
        rig.clock.advance(0.2)
        self.assertEqual(len(looks), 1)
        for _ in range(100):
            rig.source._noticed("a.yaml")
            rig.source._noticed("..data")
        rig.clock.advance(0.06)
        rig.source._noticed("")
        rig.clock.advance(0.06)
        self.assertEqual(len(looks), 2)

    def test_forcedRead(self) -> None:
        """A file that the kernel tells of is read again, though size, time and inode are as they were."""
        self.start(a=service("web", 80))
        found = os.stat(self.path("a.yaml"))
        with open(self.path("a.yaml"), "r+") as file:
            file.write(service("web", 81))
        os.utime(self.path("a.yaml"), ns=(found.st_atime_ns, found.st_mtime_ns))
        self.assertEqual(self.rig.poll(), [])
        self.rig.source._noticed("a.yaml")
        self.rig.clock.advance(0.1)
        self.assertEqual(self.rig.words.state["Service"]["shop/web"].spec.ports[0].port, 81)

    def test_lateThread(self) -> None:
        """Stopping waits for the thread, and what it found is not said."""
        waiting: list[tuple[Deferred[Any], Callable[[], Any]]] = []

        def later(function: Callable[..., Any], *args: Any) -> Deferred[Any]:
            answer: Deferred[Any] = Deferred()
            waiting.append((answer, lambda: function(*args)))
            return answer

        rig = self.rig
        rig.source = FilesSource(rig.clock, "local", Where(self.folder), rig.words, later)
        self.start(a=service("web"))
        stopped = rig.source.stopService()
        self.assertNoResult(stopped)
        answer, function = waiting.pop()
        answer.callback(function())
        self.successResultOf(stopped)
        self.assertEqual(rig.words.said, [])

    def test_faultsOf(self) -> None:
        """A check of a folder tells what is wrong with it, and nothing of what is merely skipped."""
        self.rig.write("a.yaml", "[")
        self.rig.write("b.yaml", "kind: Job\napiVersion: batch/v1\n")
        (fault,) = faultsOf(self.folder)
        self.assertTrue(fault.startswith(f"{self.path('a.yaml')}:"), fault)
        self.assertEqual(faultsOf(self.path("x")), [f"{self.path('x')}: does not exist"])


class ParseTests(SynchronousTestCase):
    """Text to objects."""

    def broken(self, text: str | bytes, isJSON: bool = False) -> Broken:
        return self.assertRaises(Broken, parse, text.encode() if isinstance(text, str) else text, isJSON)

    def one(self, text: str) -> Any:
        (found,) = parse(text.encode()).found
        self.assertEqual(found.reason, "")
        return found.object

    def labels(self, text: str) -> dict[str, str]:
        made = self.one(HEAD + f"metadata:\n  name: x\n  labels:\n    {text}\n")
        labels = made.metadata.labels
        assert isinstance(labels, dict)
        return labels

    def test_timestamps(self) -> None:
        """A date without quotes stays the text that it is."""
        stamp = "2026-11-22T07:31:27Z"
        made = self.one(HEAD + f"metadata:\n  name: x\n  creationTimestamp: {stamp}\n")
        self.assertEqual(made.metadata.creationTimestamp, stamp)
        self.assertEqual(self.labels("day: 2026-11-22"), {"day": "2026-11-22"})

    def test_plainText(self) -> None:
        """What only looks like a number of base 60 or a value key is text; quotes make text of anything."""
        labels = self.labels("a: 12:30:45\n    b: =\n    c: '80'\n    d: !!str 80\n    e: 1e3\n    f: 089\n    g: 0b_")
        expected = {"a": "12:30:45", "b": "=", "c": "80", "d": "80", "e": "1e3", "f": "089", "g": "0b_"}
        self.assertEqual(labels, expected)

    def test_numbers(self) -> None:
        """Ports may be written in any of YAML's ways."""
        for text in ("80", "0x50", "0120", "0b1010000", "8_0", "!!int 80"):
            text = f"apiVersion: v1\nkind: Service\nmetadata: {{name: x}}\nspec: {{ports: [{{port: {text}}}]}}\n"
            self.assertEqual(self.one(text).spec.ports[0].port, 80)

    def test_truths(self) -> None:
        """A label that YAML takes for a truth value is refused, as kubectl does, with its place."""
        (found,) = parse(b"apiVersion: v1\nkind: Service\nspec: {}\nmetadata:\n  name: x\n  labels: {a: yes}\n").found
        self.assertEqual((found.key, found.object), ("default/x", None))
        self.assertIn("metadata.labels", found.reason)

    def test_documents(self) -> None:
        """Documents are separated by lines of dashes; empty ones do not matter; each knows its line."""
        text = f"# a comment\n---\n---\n{service('a')}...\n---\n# b\n{service('b')}---\nnull\n"
        read = parse(text.encode())
        self.assertEqual([found.key for found in read.found], ["shop/a", "shop/b"])
        lines = text.split("\n")
        for found in read.found:
            self.assertEqual(lines[found.line - 1], "apiVersion: v1")
        self.assertEqual(read.faults, ())

    def test_windowsText(self) -> None:
        """A byte order mark and Windows' line ends are no fault."""
        self.assertEqual(len(parse(b"\xef\xbb\xbf" + service("a").replace("\n", "\r\n").encode()).found), 1)

    def test_lists(self) -> None:
        """Lists of every kind are taken apart; items of a list of one kind need not say what they are."""
        item = {"metadata": {"name": "a"}, "spec": {}}
        for kind, version, inner in (
            ("ServiceList", "v1", "Service"),
            ("EndpointsList", "v1", "Endpoints"),
            ("NodeList", "v1", "Node"),
            ("EndpointSliceList", "discovery.k8s.io/v1beta1", "EndpointSlice"),
        ):
            for isJSON in (False, True):
                text = json.dumps({"kind": kind, "apiVersion": version, "items": [item]}, indent=1)
                (found,) = parse(text.encode(), isJSON).found
                self.assertEqual((found.kind, found.reason), (inner, ""))

    def test_badItems(self) -> None:
        """A bad item of a list costs only itself, and is told with the line where it begins."""
        text = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n"
        text += "  spec: {}\n  metadata: {name: a}\n- 5\n"
        text += "- apiVersion: v1\n  kind: Service\n  metadata: {name: b}\n  spec: x\n"
        text += "- apiVersion: v1\n  kind: Service\n  metadata: {namespace: shop}\n"
        read = parse(text.encode())
        found = [(found.key, bool(found.reason)) for found in read.found]
        self.assertEqual(found, [("default/a", False), ("default/b", True)])
        faults = dict(read.faults)
        self.assertEqual(sorted(faults), [1, 9, 13])  # what is no mapping knows only its document's line
        self.assertIn("Service default/b: spec must be a mapping", faults[9])
        self.assertIn("it has no metadata.name", faults[13])

    def test_jsonLines(self) -> None:
        """Of a JSON list, too, each item knows its line."""
        items = [manifest("a"), manifest("b", port="x"), manifest("a")]
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items}, indent=2)
        read = parse(text.encode(), True)
        lines = text.split("\n")
        for found in read.found:
            self.assertEqual(lines[found.line - 1].strip(), "{")
            self.assertIn('"apiVersion"', lines[found.line])
        self.assertEqual(len(read.faults), 2)

    def test_faults(self) -> None:
        """What is no object at all is told, with what it is instead."""
        for text, expected in (
            ("5", "is no object but a number"),
            ("- a", "is no object but a list"),
            ("metadata: {name: x}", "has no kind"),
            ("kind: Service\nmetadata: {name: x}", "Service default/x: apiVersion is missing; it must be v1"),
            ("kind: Node\nmetadata: {name: x}", "Node x: apiVersion is missing; it must be v1"),
            ("kind: Service\nmetadata: [x]", "Service: apiVersion is missing; it must be v1"),
            ("kind: Service\napiVersion: v1/v1\nmetadata: {name: x, namespace: 5}", "Service: apiVersion must be v1"),
            ("kind: Service\napiVersion: [v1]\nmetadata: {name: x}", "Service default/x: apiVersion must be v1"),
            ("kind: EndpointSlice\napiVersion: discovery.k8s.io/v2", "must be discovery.k8s.io/v1 or discovery."),
            ("kind: Service\napiVersion: v1\nmetadata: []", "Service: metadata must be a mapping"),
            ("kind: List\napiVersion: v1\nitems: 5", "items is no list but a number"),
        ):
            (fault,) = parse(text.encode()).faults
            self.assertIn(expected, fault[1])

    def test_brokenText(self) -> None:
        """What is no YAML is told with its line."""
        for text, line, expected in (
            ("a: 1\nb: [1\nc: 2\n", 3, "is no YAML"),
            ("a: 1\n\tb: 2\n", 2, "is no YAML"),
            (b"a: 1\nb: \xff\n", 2, "is not UTF-8 text"),
            ("a: 1\nb: \x00\n", 2, "is no YAML"),
            ("a: 1\nb: 2\na: 3\n", 3, "the key 'a' is given twice"),
            ("a: 1\n? [b]\n: 2\n", 2, "a key must be text"),
            ("a:\n  b: *c\n", 2, "*c stands for nothing before it"),
            ("a: &x\n  b: *x\n", 2, "*x stands for nothing before it"),
            ("a: !!python/object:os.system x\n", 1, "the tag tag:yaml.org,2002:python/object:os.system is not known"),
            ("a: 1\nb: !!int x\n", 2, "'x' is no int"),
        ):
            error = self.broken(text)
            self.assertEqual(error.line, line, (text, error.reason))
            self.assertIn(expected, error.reason)

    def test_brokenJSON(self) -> None:
        """What is no JSON is told with its line where that can be told."""
        self.assertEqual(self.broken('{\n"a": 1,\n"b": x}', True).line, 3)
        self.assertIn("is no JSON object", self.broken("[1]", True).reason)
        self.assertIn("is no JSON object", self.broken("[" * 100_000, True).reason)
        self.assertEqual(parse(b" \n", True), manifests.Manifest())

    def test_deep(self) -> None:
        """Nesting without end is refused before it can hurt, whichever way it is written."""
        block = "\n".join(" " * depth + "a:" for depth in range(300))
        for text in ("[" * 200_000, "{a: " * 50_000, "- " * 50_000 + "x", block):
            self.assertIn("nested deeper than", self.broken(text).reason)

    def test_aliases(self) -> None:
        """Anchors and merge keys work; what would unfold without end is refused."""
        text = "a: &l {app: web, tier: x}\napiVersion: v1\nkind: Service\nspec: {}\nmetadata:\n  name: x\n"
        text += "  labels: {<<: *l, tier: y}\n"
        self.assertEqual(self.one(text).metadata.labels, {"app": "web", "tier": "y"})
        bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        for number in range(1, 9):
            bomb += f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 10)}]\n"
        self.assertIn("aliases stand for more than", self.broken(bomb).reason)

    def test_large(self) -> None:
        """A file that is far too large is refused unread."""
        self.assertIn("is larger than 32 MiB", self.broken(b" " * (manifests.MAX_BYTES + 1)).reason)

    @settings(max_examples=300, deadline=None)
    @given(st.text(st.sampled_from("ab:-[]{}&*!|>'\"#%@, \n\t0129~<="), max_size=80), st.booleans())
    def test_anyText(self, text: str, isJSON: bool) -> None:
        """Any text is read or refused, nothing else."""
        try:
            parse(text.encode(), isJSON)
        except Broken as error:
            self.assertTrue(error.reason)

    @settings(max_examples=300, deadline=None)
    @given(st.from_regex(r"\A[-+]?[0-9.][0-9a-fxobeE_.+-]{0,6}\Z"))
    def test_numbersAsPyYAML(self, text: str) -> None:
        """What may be a number is read as PyYAML reads it, which writes no quotes where it sees text."""
        try:
            expected = yaml.safe_load(f"- {text}")
        except (ValueError, yaml.YAMLError):
            return
        if isinstance(expected, list) and isinstance(expected[0], str | int | float):
            ((_, (read, _lines)),) = manifests._yaml(f"- {text}".encode())
            self.assertEqual(read, expected)

    @settings(max_examples=150, deadline=None)
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(10**12), 10**12) | TEXTS | st.floats(-1e9, 1e9),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
            max_leaves=12,
        )
    )
    def test_sameAsPyYAML(self, value: Any) -> None:
        """What PyYAML writes is read as what it was."""
        text = yaml.safe_dump({"value": value}, allow_unicode=True)
        ((_, (read, _lines)),) = manifests._yaml(text.encode())
        self.assertEqual(read, {"value": value})


class KernelTests(TestCase):
    """With the real reactor, its threads, and inotify."""

    timeout = 20

    def setUp(self) -> None:
        self.folder = os.path.abspath(self.mktemp())
        os.mkdir(self.folder)
        self.words = Words()
        self.waiting: list[tuple[Callable[[], bool], Deferred[None]]] = []
        say = self.words.say

        def saying(word: Any) -> None:
            say(word)
            for item in list(self.waiting):
                if item[0]():
                    self.waiting.remove(item)
                    item[1].callback(None)

        self.words.say = saying  # type: ignore[method-assign]
        self.source = FilesSource(reactor, "local", Where(self.folder, 3600.0), self.words)
        self.addCleanup(self.source.stopService)

    def when(self, condition: Callable[[], bool]) -> Deferred[None]:
        """Fires with the word after which that is so; polling comes far too late for it."""
        fired: Deferred[None] = Deferred()
        if condition():
            fired.callback(None)
        else:
            self.waiting.append((condition, fired))
        return fired

    def ports(self) -> dict[str, int]:
        return {key: it.spec.ports[0].port for key, it in self.words.state.get("Service", {}).items()}

    def write(self, name: str, text: str) -> None:
        with open(os.path.join(self.folder, name), "w") as file:
            file.write(text)

    async def test_changes(self) -> None:
        """Files that are written, changed in place, renamed and removed are noticed by the kernel's word."""
        self.write("a.yaml", service("web"))
        self.source.startService()
        await self.when(lambda: len(self.words.said) == 4)
        self.assertEqual(self.ports(), {"shop/web": 80})
        self.assertTrue(self.source.status()["watching"])
        self.write("a.yaml", service("web", 81))
        await self.when(lambda: self.ports() == {"shop/web": 81})
        self.write(".new", service("db", 5432))
        os.rename(os.path.join(self.folder, ".new"), os.path.join(self.folder, "b.yaml"))
        await self.when(lambda: self.ports() == {"shop/web": 81, "shop/db": 5432})
        os.unlink(os.path.join(self.folder, "a.yaml"))
        await self.when(lambda: self.ports() == {"shop/db": 5432})

    async def test_configMap(self) -> None:
        """The exchange of a mounted ConfigMap is noticed."""
        for number in (1, 2):
            os.mkdir(os.path.join(self.folder, f"..{number}"))
            self.write(f"..{number}/web.yaml", service("web", number))
        os.symlink("..1", os.path.join(self.folder, "..data"))
        os.symlink("..data/web.yaml", os.path.join(self.folder, "web.yaml"))
        self.source.startService()
        await self.when(lambda: self.ports() == {"shop/web": 1})
        os.symlink("..2", os.path.join(self.folder, "..tmp"))
        os.rename(os.path.join(self.folder, "..tmp"), os.path.join(self.folder, "..data"))
        await self.when(lambda: self.ports() == {"shop/web": 2})

    async def test_folderComesAndGoes(self) -> None:
        """A folder that appears, is removed and appears again is followed; no descriptor is lost."""
        await self.source.stopService()
        inner = os.path.join(self.folder, "inner")
        self.source = FilesSource(reactor, "local", Where(inner, 3600.0), self.words)
        self.source.startService()
        before = 0
        for port in (1, 2, 3):
            os.mkdir(inner)
            self.write("inner/a.yaml", service("web", port))
            await self.when(lambda port=port: self.ports() == {"shop/web": port})  # type: ignore[misc]
            before = before or len(os.listdir("/proc/self/fd"))
            os.unlink(os.path.join(inner, "a.yaml"))
            await self.when(lambda: self.ports() == {})
            os.rmdir(inner)
        self.assertLessEqual(len(os.listdir("/proc/self/fd")), before + 1)
        await self.source.stopService()

    async def test_largeFolder(self) -> None:
        """While thousands of objects are read, the reactor goes on turning."""
        for number in range(50):
            docs = "---\n".join(service(f"s{number}-{index}") for index in range(100))
            self.write(f"{number}.yaml", docs)
        turns = 0

        def turn() -> None:
            nonlocal turns
            turns += 1
            if not self.words.said:
                reactor.callLater(0, turn)  # type: ignore[attr-defined]

        self.source.startService()
        turn()
        await self.when(lambda: len(self.words.said) == 4)
        self.assertEqual(len(self.ports()), 5000)
        self.assertGreater(turns, 5)


