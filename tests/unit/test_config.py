"""The ini file: what it may say, and what it is told when it says something else."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from twisted.trial.unittest import SynchronousTestCase

from twisted_kproxy import config
from twisted_kproxy.config import ApiOptions, Config, FilesOptions, HostPort, InvalidConfig, PluginOptions, reading
from twisted_kproxy.config.ini import parseIni
from twisted_kproxy.config.values import readDuration, writeDuration
from twisted_kproxy.core.locality import NodeSettings
from twisted_kproxy.interfaces import NotAvailable

ETC = Path(__file__).parents[2] / "etc"
LOCAL = "[source:local]\ntype = files\npath = services.d\n"


class IniCase(SynchronousTestCase):
    """Loads ini text from a file of its own."""

    def setUp(self) -> None:
        self.folder = os.path.abspath(self.mktemp())
        os.mkdir(self.folder)
        self.path = os.path.join(self.folder, "kproxy.ini")

    def load(self, text: str | bytes, **known: object) -> Config:
        with open(self.path, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
        return config.load(self.path, hostname=lambda: "Node-7.Example.com", **known)  # type: ignore[arg-type]

    def faults(self, text: str | bytes, **known: object) -> list[str]:
        """The faults of a text, without the path before each."""
        error = self.assertRaises(InvalidConfig, self.load, text, **known)
        for fault in error.faults:
            self.assertTrue(fault.startswith(f"{self.path}:"), fault)
            self.assertNotIn("\n", fault)
        return [fault.removeprefix(f"{self.path}:") for fault in error.faults]

    def fault(self, text: str, **known: object) -> str:
        """The only fault of a text."""
        faults = self.faults(text, **known)
        self.assertEqual(len(faults), 1, faults)
        return faults[0]

    def userFault(self, section: str, line: str) -> str:
        """The only fault of one line in one section; the line is number 5."""
        return self.fault(f"{LOCAL}[{section}]\n{line}\n")


class LoadTests(IniCase):
    """What a good file becomes."""

    def test_defaults(self) -> None:
        """A file with nothing but a source gives every other value its default."""
        self.assertEqual(
            self.load(LOCAL),
            Config(
                path=self.path,
                nodeName="node-7.example.com",
                sources=(FilesOptions("local", os.path.join(self.folder, "services.d")),),
            ),
        )

    def test_everything(self) -> None:
        """Every key can be set; comments and blanks around mean nothing; sources keep their order."""
        loaded = self.load(
            "\ufeff# all of it\r\n"
            "  [kproxy]\t; the daemon\n"
            "mode=userspace ; the only one\n"
            "node-name = Node-A\n"
            "cluster-cidr = 10.128.0.0/14 , fd00:10::/48\n"
            "min-sync-period = 250ms\n"
            "sync-period = 1m30s\n"
            "proxy-name = kproxy.example\n"
            "log-format = json\n"
            "[source:zeta]\ntype = api\nserver = https://10.0.0.1:6443\ntoken-file = token\nca-file = /ca.pem\n"
            "client-certificate = ../c.pem\nclient-key = c.key\nwatch-list = off\n"
            "[source:alpha]\ntype = files\npath = one;two.yaml ; a semicolon without a blank is part of the path\n"
            "poll-interval = 1s\n"
            "[source:inside]\ntype = api\nin-cluster = Yes\n"
            "[rules]\nwriter = python-iptables\n"
            "[userspace]\nconnect-timeouts = 100ms, 1s\nudp-idle-timeout = 2m\nport-range = 36000 - 36999\n"
            "drain-timeout = 0s\n"
            "[balance]\npolicy = least-connections\n"
            "[conntrack]\nsysctls = on\nmax-per-core = 0\nmin = 1000\ntcp-established-timeout = 120h\n"
            "tcp-close-wait-timeout =\nudp-timeout = 1m\nudp-stream-timeout = 0s\ntcp-be-liberal = yes\n"
            "[health]\nbind =\n"
            "[metrics]\nbind = [::1]:0\n"
        )
        self.assertEqual(
            loaded,
            Config(
                path=self.path,
                mode="userspace",
                nodeName="node-a",
                clusterCIDR=("10.128.0.0/14", "fd00:10::/48"),
                minSyncPeriod=0.25,
                syncPeriod=90.0,
                proxyName="kproxy.example",
                logFormat="json",
                sources=(
                    ApiOptions(
                        "zeta",
                        server="https://10.0.0.1:6443",
                        tokenFile=os.path.join(self.folder, "token"),
                        caFile="/ca.pem",
                        clientCertificate=os.path.join(os.path.dirname(self.folder), "c.pem"),
                        clientKey=os.path.join(self.folder, "c.key"),
                        watchList="off",
                    ),
                    FilesOptions("alpha", os.path.join(self.folder, "one;two.yaml"), 1.0),
                    ApiOptions("inside", inCluster=True),
                ),
                writer="python-iptables",
                connectTimeouts=(0.1, 1.0),
                udpIdleTimeout=120.0,
                portRange=(36000, 36999),
                drainTimeout=0.0,
                policy="least-connections",
                conntrackSysctls="on",
                conntrackMaxPerCore=0,
                conntrackMin=1000,
                conntrackTcpEstablished=432000,
                conntrackTcpCloseWait=0,
                conntrackUdp=60,
                conntrackUdpStream=0,
                conntrackTcpBeLiberal=True,
                healthBind=None,
                metricsBind=HostPort("::1", 0),
            ),
        )

    def test_pluginNames(self) -> None:
        """A writer, a policy and a type of source that somebody else offers can be chosen; the keys are theirs."""
        loaded = self.load(
            "[source:x]\ntype = consul\nurl = http://127.0.0.1\n[rules]\nwriter = ebpf\n[balance]\npolicy = p2c\n",
            writers=["ebpf"],
            policies=["p2c"],
            sourceTypes=["consul"],
        )
        self.assertEqual((loaded.writer, loaded.policy), ("ebpf", "p2c"))
        self.assertEqual(
            loaded.sources, (PluginOptions("x", "consul", {"url": "http://127.0.0.1"}, self.folder),)
        )

    def test_pluginSecrets(self) -> None:
        """What a plug-in's key calls a secret is not shown; where a secret's file lies is."""
        text = "[source:x]\ntype = consul\napi-token = hunter2\ntoken-file = /t\nurl = http://me:hunter2@h\n"
        said = config.effective(self.load(text, sourceTypes=["consul"]))["source:x"]
        self.assertEqual(
            said, {"type": "consul", "api-token": "***", "token-file": "/t", "url": "http://***@h"}
        )

    def test_shippedFile(self) -> None:
        """The shipped file is good, and each default that it shows in a comment is the default."""
        text = (ETC / "kproxy.ini").read_text("utf-8")
        plain = self.load(text)
        self.assertEqual(
            plain, replace(self.load(LOCAL), sources=plain.sources)
        )
        commented = re.compile(r"^;([a-z-]+ =.*)$", re.MULTILINE)
        example = re.compile(r"^;(type|kubeconfig|watch-list) =", re.MULTILINE)
        keys = commented.findall(example.sub("# \\1:", text))
        self.assertEqual(len(keys), 35)
        self.assertEqual(self.load(commented.sub(r"\1", example.sub("# \\1:", text))), plain)

    def test_rendered(self) -> None:
        """What is in force, written as ini text, is read as the same."""
        before = self.load(
            "[source:b]\ntype = files\npath = x\n[source:a]\ntype = api\nin-cluster = yes\n"
            "[kproxy]\ncluster-cidr = fd00::/64\n[userspace]\nport-range = 36000-36999\n[health]\nbind =\n"
            "[metrics]\nbind = [::1]:99\n[conntrack]\ntcp-close-wait-timeout =\nudp-timeout = 30s\n"
        )
        self.assertEqual(self.load(config.render(before)), before)

    def test_effective(self) -> None:
        """What is in force can be written as JSON, in the words of the ini file, and shows no user's password."""
        loaded = self.load(f"{LOCAL}[source:c]\ntype = api\nserver = https://me:hunter2@host:6443/x\n")
        said = config.effective(loaded)
        self.assertNotIn("hunter2", json.dumps(said))
        self.assertNotIn("hunter2", config.render(loaded))
        self.assertEqual(
            said["source:c"], {"type": "api", "server": "https://***@host:6443/x", "watch-list": "auto"}
        )
        self.assertEqual(said["kproxy"]["sync-period"], "30s")
        self.assertEqual(said["userspace"]["connect-timeouts"], "250ms 500ms 1s 2s")


class FaultTests(IniCase):
    """What a bad file is told."""

    def test_everyFaultAtOnce(self) -> None:
        """All faults of a file are told together, in its order, each with line, section and key."""
        faults = self.faults(
            "[kproxy]\nmode = turbo\nsync-period = 5\nsync-period = 6s\n[rules]\nwriter = ipfw\n[rules]\nnonsense\n"
        )
        lines = [fault.partition(":")[0] for fault in faults]
        self.assertEqual(lines, ["2", "3", "4", "6", "7", "8", " no source of services"])
        self.assertIn("[kproxy] mode = turbo: must be one of userspace", faults[0])
        self.assertIn("write 5s for seconds", faults[1])
        self.assertIn("given twice, first on line 3", faults[2])
        self.assertIn("must be one of auto, nftables, python-iptables, iptables", faults[3])
        self.assertIn("[rules] is given twice, first on line 5", faults[4])
        self.assertIn("expected 'key = value'", faults[5])
        self.assertIn("add one", faults[6])

    def test_unbuiltModes(self) -> None:
        """The modes that are not built yet are told apart from those that do not exist."""
        for mode in ("nftables", "iptables"):
            self.assertIn(f"mode = {mode}: is not built yet; use userspace", self.userFault("kproxy", f"mode = {mode}"))

    def test_unknownKey(self) -> None:
        """An unknown key is answered with the nearest one, or with where it belongs, or with all."""
        self.assertIn("did you mean 'sync-period'?", self.userFault("kproxy", "sync-perod = 1s"))
        self.assertIn("did you mean 'mode'?", self.userFault("kproxy", "Mode = userspace"))
        self.assertIn("belongs under [userspace]", self.userFault("kproxy", "port-range = 2000-3000"))
        self.assertIn("there is mode, node-name", self.userFault("kproxy", "zzz = 1"))

    def test_unknownSection(self) -> None:
        """An unknown section is answered with the nearest one and all there are."""
        fault = self.fault(f"{LOCAL}[heath]\nbind =\n")
        self.assertIn("[heath] is not known; did you mean 'health'? There is [kproxy], [", fault)
        self.assertIn("[wat] is not known; there is [kproxy], [", self.fault(f"{LOCAL}[wat]\n"))
        self.assertIn("[source:NAME]", fault)
        self.assertIn("did you mean 'source:b'?", self.fault(f"{LOCAL}[sources:b]\n"))

    def test_unknownNames(self) -> None:
        """An unknown writer, policy or type of source is answered with the known ones."""
        known = "auto, nftables, python-iptables, iptables, iptables-legacy, iptables-nft, none"
        self.assertIn(f"must be one of {known}", self.userFault("rules", "writer = pf"))
        self.assertIn("did you mean 'round-robin'?", self.userFault("balance", "policy = roundrobin"))
        fault = self.fault("[source:x]\ntype = api\nin-cluster = yes\nwatch-list = on\n")
        self.assertIn("watch-list = on: must be one of auto, off", fault)
        self.assertIn("must be one of api, files, consul", self.fault("[source:x]\ntype = x\n", sourceTypes=["consul"]))
        self.assertIn("type is missing: say type = one of api, files", self.fault("[source:x]\npath = x\n"))

    def test_sourceNames(self) -> None:
        """A source must have a name that can stand in logs and metrics."""
        for name in ("source", "source:", "source:a b", "source:é", "source:-x"):
            self.assertIn("name it [source:NAME]", self.fault(f"[{name}]\ntype = files\npath = x\n"))

    def test_values(self) -> None:
        """Each sort of value is judged, and the fault says what is allowed."""
        for section, line, expected in (
            ("kproxy", "node-name = a_b", "must be the name of a Node"),
            ("kproxy", "node-name = -a", "must be the name of a Node"),
            ("kproxy", "cluster-cidr = 10.0.0.0", "has no prefix length"),
            ("kproxy", "cluster-cidr = 10.0.0.1/8", "write 10.0.0.0/8"),
            ("kproxy", "cluster-cidr = pods/8", "is no network"),
            ("kproxy", "cluster-cidr = 10.0.0.0/8,,fd00::/8", "has an empty item"),
            ("kproxy", "cluster-cidr = 10.0.0.0/8, 11.0.0.0/8", "has two IPv4 networks, 10.0.0.0/8 and 11.0.0.0/8"),
            ("kproxy", "min-sync-period = soon", "must be a duration with a unit"),
            ("kproxy", "min-sync-period =", "must be a duration with a unit"),
            ("kproxy", "min-sync-period = -1s", "must be a duration with a unit"),
            ("kproxy", "min-sync-period = 1s 2s", "must be a duration with a unit"),
            ("kproxy", "sync-period = 25h", "must be at most 24h"),
            ("kproxy", "proxy-name = -x", "must be a label value"),
            ("kproxy", "log-format = xml", "must be one of text, json"),
            ("userspace", "connect-timeouts =", "must hold at least one duration"),
            ("userspace", "connect-timeouts = ; none", "must hold at least one duration"),
            ("userspace", "connect-timeouts = 1s 0s", "must be at least 1ms"),
            ("userspace", "connect-timeouts = 1s 2", "connect-timeouts = 1s 2: 2 has no unit: write 2ms or 2s; units"),
            ("userspace", "connect-timeouts = 250 500", "250 has no unit: write 250ms or 250s; units are"),
            ("userspace", "udp-idle-timeout = 0s", "must be at least 1ms"),
            ("userspace", "port-range = 36999-36000", "is reversed: write 36000-36999"),
            ("userspace", "port-range = 1000-2000", "must lie within 1024 to 65535"),
            ("userspace", "port-range = 60000-70000", "must lie within 1024 to 65535"),
            ("userspace", "port-range = 36000", "must be FIRST-LAST"),
            ("conntrack", "sysctls = maybe", "must be one of auto, on, off"),
            ("conntrack", "min = -1", "must be a number from 0 to"),
            ("conntrack", "max-per-core = 2147483648", "must be a number from 0 to"),
            ("conntrack", "udp-timeout = 1500ms", "must be whole seconds"),
            ("conntrack", "udp-timeout = 30", "write 30s for seconds"),
            ("conntrack", "tcp-established-timeout = 8761h", "at most 8760h"),
            ("conntrack", "tcp-be-liberal = maybe", "must be yes or no"),
            ("health", "bind = localhost:1", "must be ADDRESS:PORT"),
            ("health", "bind = 10256", "must be ADDRESS:PORT"),
            ("health", "bind = 300.0.0.1:1", "must be ADDRESS:PORT"),
            ("health", "bind = ::1:10256", "must be ADDRESS:PORT"),
            ("health", "bind = [127.0.0.1]:1", "only IPv6 addresses are bracketed"),
            ("health", "bind = 127.0.0.1:65536", "the port must be 0 to 65535"),
            ("health", "bind = 127.0.0.1:٣", "must be ADDRESS:PORT"),
        ):
            fault = self.userFault(section, line)
            self.assertTrue(fault.startswith(f"5: [{section}] {line.partition(';')[0].strip()}: "), fault)
            self.assertIn(expected, fault)
        self.assertIn("at most 253", self.userFault("kproxy", f"node-name = {'a' * 254}"))

    def test_api(self) -> None:
        """A source of type api must say exactly one place, and only what goes with it."""
        for lines, expected in (
            ("", "give kubeconfig = FILE, in-cluster = yes, or server"),
            ("in-cluster = no", "give kubeconfig = FILE"),
            ("in-cluster = perhaps", "must be yes or no"),
            ("kubeconfig = k\nin-cluster = yes", "in-cluster = yes: contradicts kubeconfig on line 3: keep one"),
            ("kubeconfig = k\nserver = https://h", "server = https://h: contradicts kubeconfig on line 3"),
            ("kubeconfig = k\ntoken-file = t", "goes with server, not with kubeconfig"),
            ("server = http://h\ntoken-file = t", "needs an https server"),
            ("server = https://h\nclient-certificate = c", "needs client-key"),
            ("server = https://h\nclient-key = c", "needs client-certificate"),
            ("server = h:6443", "must be a URL such as https://10.0.0.1:6443"),
            ("server = https://h:99999", "must be a URL"),
            ("server = https://h/?x=1", "without '?' or '#'"),
            ("in-cluster = yes\nserver = http://h", "must be an https server beside in-cluster"),
            ("in-cluster = yes\nserver = https://h\ntoken-file = t", "goes with server, not with in-cluster"),
            ("kubeconfig = k\ntls-server-name = api", "goes with server, not with kubeconfig"),
            ("server = http://h\ntls-server-name = api", "needs an https server"),
            ("server = https://h\ntls-server-name = a b", "must be a host name"),
            ("server = https://h\nproxy-url = socks4://h", "must be none, environment, or the URL of a proxy"),
            ("server = https://h\nproxy-url = gopher://me:hunter2@h", "gopher://***@h: must be none"),
        ):
            self.assertIn(expected, self.fault(f"[source:c]\ntype = api\n{lines}\n"))

    def test_apiTogether(self) -> None:
        """A pod's account may be used at another server; a proxy goes with every way, and its password is masked."""
        for lines, expected in (
            ("in-cluster = yes\nserver = https://h", {"inCluster": True, "server": "https://h"}),
            (
                "in-cluster = yes\nserver = https://h\ntls-server-name = kubernetes",
                {"inCluster": True, "server": "https://h", "tlsServerName": "kubernetes"},
            ),
            ("in-cluster = yes\nproxy-url = none", {"inCluster": True, "proxyUrl": "none"}),
            ("server = http://h\nproxy-url = socks5://p", {"server": "http://h", "proxyUrl": "socks5://p"}),
            ("server = https://h\nproxy-url = environment", {"server": "https://h", "proxyUrl": "environment"}),
        ):
            (options,) = self.load(f"[source:c]\ntype = api\n{lines}\n").sources
            self.assertEqual(options, ApiOptions("c", **expected))
        loaded = self.load("[source:c]\ntype = api\nserver = https://h\nproxy-url = http://me:hunter2@p:3128\n")
        self.assertEqual(config.effective(loaded)["source:c"]["proxy-url"], "http://***@p:3128")

    def test_files(self) -> None:
        """A source of type files must say where they are."""
        self.assertIn("[source:c] path is missing", self.fault("[source:c]\ntype = files\n"))
        self.assertIn("[source:c] path is missing", self.fault("[source:c]\ntype = files\npath =\n"))
        self.assertIn("there is path, poll-interval", self.fault("[source:c]\ntype = files\npath = x\nserver = x\n"))

    def test_syncPeriods(self) -> None:
        """A full sync cannot be due more often than a sync is allowed, be it set or by default."""
        for line in ("sync-period = 500ms", "min-sync-period = 31s"):
            fault = self.userFault("kproxy", line)
            self.assertIn("is shorter than min-sync-period", fault)
            self.assertTrue(fault.startswith("5: "), fault)
        self.load(f"{LOCAL}[kproxy]\nmin-sync-period = 30s\n")

    def test_clashingPorts(self) -> None:
        """Two listeners on one port are a fault where their addresses overlap, and only there."""
        for health, metrics in (
            ("0.0.0.0:1", "127.0.0.1:1"),
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("[::]:1", "127.0.0.1:1"),
            ("[::]:1", "[::1]:1"),
            ("0.0.0.0:10249", None),
        ):
            other = f"[metrics]\nbind = {metrics}\n" if metrics else ""
            self.assertIn("is the same port as", self.fault(f"{LOCAL}[health]\nbind = {health}\n{other}"))
        for health, metrics in (
            ("127.0.0.2:1", "127.0.0.1:1"),
            ("0.0.0.0:1", "[::1]:1"),
            ("0.0.0.0:1", "0.0.0.0:2"),
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("", "127.0.0.1:10256"),
        ):
            self.load(f"{LOCAL}[health]\nbind = {health}\n[metrics]\nbind = {metrics}\n")

    def test_noCascade(self) -> None:
        """A value at fault brings no second fault about what it might have meant."""
        self.fault("[source:c]\ntype = api\nserver = nowhere\n")
        self.userFault("kproxy", "min-sync-period = often")

    def test_watchListAnywhere(self) -> None:
        """How lists are read goes with every way to reach an API server."""
        for way in ("in-cluster = yes", "kubeconfig = /k", "server = http://127.0.0.1:8001"):
            (source,) = self.load(f"[source:c]\ntype = api\n{way}\nwatch-list = off\n").sources
            assert isinstance(source, ApiOptions)
            self.assertEqual(source.watchList, "off")

    def test_secretsInFaults(self) -> None:
        """A password in a URL is not shown, whatever is wrong with the line."""
        for lines in ("server = http://me:hunter2@h\ntoken-file = t", "server = ftp://me:hunter2@h", "https://me:hunter2@h"):
            for fault in self.faults(f"[source:c]\ntype = api\n{lines}\n"):
                self.assertNotIn("hunter2", fault)

    def test_controlCharacters(self) -> None:
        """What is shown of a file cannot steer a terminal."""
        for fault in self.faults(f"{LOCAL}[kproxy]\nmode = \x1b[31mred\n\x1b[2J = 1\n[\x1b]\n\x07\n"):
            self.assertTrue(fault.isprintable(), fault)

    def test_hostname(self) -> None:
        """A host name that cannot be a Node's name asks for node-name."""
        with open(self.path, "w") as file:
            file.write(LOCAL)
        error = self.assertRaises(InvalidConfig, config.load, self.path, hostname=lambda: "my_host")
        self.assertIn("'my_host' must be the name of a Node", error.faults[0])
        self.assertIn("set node-name", error.faults[0])
        with open(self.path, "a") as file:
            file.write("[kproxy]\nnode-name = my_node\n")
        error = self.assertRaises(InvalidConfig, config.load, self.path, hostname=lambda: "my_host")
        self.assertEqual(len(error.faults), 1)  # the host name does not matter where the file says one
        self.assertIn("my_node", error.faults[0])

    def test_unreadable(self) -> None:
        """A file that is missing, not text or far too large is one clear fault."""
        error = self.assertRaises(InvalidConfig, config.load, self.path)
        self.assertEqual(error.faults, [f"{self.path}: cannot be read: No such file or directory"])
        self.assertIn("2: is not UTF-8 text", self.faults(b"\n[\xff]\n")[0])
        self.assertIn("larger than", self.faults(b";" * (2 << 20))[0])
        error = self.assertRaises(InvalidConfig, config.load, self.folder)
        self.assertIn("Is a directory", error.faults[0])

    def test_message(self) -> None:
        """As an exception it reads as its faults, a line each."""
        self.assertEqual(str(InvalidConfig(["one", "two"])), "one\ntwo")


class LocalityTests(IniCase):
    """Which addresses mean what on the node."""

    def kproxy(self, *lines: str) -> Config:
        return self.load(f"{LOCAL}[kproxy]\n" + "\n".join(lines))

    def test_defaults(self) -> None:
        """Nothing said: nobody is inside, node ports everywhere, every address may be a frontend."""
        self.assertEqual(config.nodeSettings(self.load(LOCAL)), NodeSettings())
        said = config.effective(self.load(LOCAL))["kproxy"]
        self.assertEqual(
            {key: said[key] for key in ("detect-local", "node-port-addresses", "masquerade-all", "frontend-allow")},
            {
                "detect-local": "cluster-cidr", "node-port-addresses": "all", "masquerade-all": "no",
                "frontend-allow": "",
            },
        )

    def test_everything(self) -> None:
        """Every key can be set, and is written as it would be read."""
        loaded = self.kproxy(
            "detect-local = cluster-cidr", "cluster-cidr = 10.128.0.0/14", "masquerade-all = yes",
            "node-port-addresses = primary, 192.0.2.0/24, 2001:DB8::/32, primary",
            "frontend-allow = 198.51.100.0/24, 203.0.113.0/24, 2001:db8::/32", "frontend-deny = 198.51.100.7/32",
        )
        self.assertTrue(loaded.masqueradeAll)
        self.assertEqual(
            config.nodeSettings(loaded),
            NodeSettings(
                clusterCIDRs=("10.128.0.0/14",),
                nodePortAddresses=("primary", "192.0.2.0/24", "2001:db8::/32"),
                allowed=("198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32"),
                denied=("198.51.100.7/32",),
            ),
        )
        self.assertEqual(config.nodeSettings(self.load(config.render(loaded))), config.nodeSettings(loaded))

    def test_listeners(self) -> None:
        """Where the proxy itself answers, which is no place for node ports."""
        loaded = self.load(f"{LOCAL}[health]\nbind = [::]:20256\n[metrics]\nbind =\n")
        self.assertEqual(config.nodeSettings(loaded), NodeSettings(listeners=(("::", 20256),)))

    def test_ways(self) -> None:
        """Each way to tell pods has what it needs."""
        for lines, expected in (
            (["detect-local = node-cidr"], NodeSettings("node-cidr")),
            (["detect-local = bridge", "pod-bridge = cni0"], NodeSettings("bridge", podInterface="cni0")),
            (
                ["detect-local = interface-prefix", "pod-interface-prefix = veth", "pod-bridge ="],
                NodeSettings("interface-prefix", podInterface="veth"),
            ),
            (["detect-local = cluster-cidr"], NodeSettings()),
            (["detect-local = node-cidr", "cluster-cidr ="], NodeSettings("node-cidr")),
        ):
            self.assertEqual(config.nodeSettings(self.kproxy(*lines)), expected)

    def test_contradictions(self) -> None:
        """A way without what it needs, and what belongs to another way, are faults; each is told once."""
        for lines, expected in (
            ("detect-local = bridge", "5: [kproxy] detect-local = bridge: needs pod-bridge"),
            (
                "pod-bridge =\ndetect-local = bridge",
                "6: [kproxy] detect-local = bridge: needs pod-bridge",
            ),
            (
                "detect-local = interface-prefix",
                "5: [kproxy] detect-local = interface-prefix: needs pod-interface-prefix",
            ),
            (
                "pod-bridge = cni0",
                "5: [kproxy] pod-bridge = cni0: goes with detect-local = bridge, not with cluster-cidr: remove it",
            ),
            (
                "detect-local = node-cidr\ncluster-cidr = 10.0.0.0/8",
                "6: [kproxy] cluster-cidr = 10.0.0.0/8: goes with detect-local = cluster-cidr, not with node-cidr: "
                "remove it",
            ),
            (
                "detect-local = bridge\npod-bridge = cni0\npod-interface-prefix = veth",
                "7: [kproxy] pod-interface-prefix = veth: goes with detect-local = interface-prefix, not with bridge: "
                "remove it",
            ),
            # What is at fault itself is not judged any further.
            ("detect-local = bridge\npod-bridge = a/b", "6: [kproxy] pod-bridge = a/b: must be the name of an inter"),
            ("detect-local = pods\npod-bridge = cni0", "5: [kproxy] detect-local = pods: must be one of cluster-cidr"),
        ):
            fault = self.userFault("kproxy", lines)
            self.assertTrue(fault.startswith(expected), fault)
        both = self.faults(f"{LOCAL}[kproxy]\ndetect-local = bridge\npod-interface-prefix = veth\n")
        self.assertEqual(len(both), 2, both)

    def test_values(self) -> None:
        """Each sort of value is judged, and the fault says what is allowed."""
        interface = "must be the name of an interface: at most 15 characters, without blanks, / : * + % and !"
        for line, expected in (
            ("detect-local = cidr", "must be one of cluster-cidr, node-cidr, bridge, interface-prefix"),
            (f"pod-bridge = {'b' * 16}", interface),
            ("pod-bridge = cni 0", interface),
            ("pod-interface-prefix = cali+", interface),
            ("pod-interface-prefix = cali*", interface),
            ("masquerade-all = all", "must be yes or no"),
            ("node-port-addresses =", "has an empty item: write networks as 10.128.0.0/14, fd00:10::/48; or say one"),
            ("node-port-addresses = primary,,all", "has an empty item"),
            ("node-port-addresses = Primary", "Primary has no prefix length"),
            ("node-port-addresses = localhst", "or say one of primary, localhost, all"),
            ("node-port-addresses = 192.0.2.7", "has no prefix length"),
            ("node-port-addresses = 192.0.2.7/24", "has bits set after its prefix: write 192.0.2.0/24"),
            ("node-port-addresses = pods/8", "pods/8 is no network"),
            ("frontend-allow = 10.0.0.1/8", "write 10.0.0.0/8"),
            ("frontend-allow = 10.0.0.0/8,", "has an empty item"),
            ("frontend-allow = all", "all has no prefix length"),
            ("frontend-deny = 127.0.0.1", "has no prefix length"),
            ("frontend-deny = ::/0/0", "is no network"),
            ("frontend-deny = ,", "has an empty item"),
        ):
            fault = self.userFault("kproxy", line)
            self.assertTrue(fault.startswith(f"5: [kproxy] {line}: "), fault)
            self.assertIn(expected, fault)


class CheckFilesTests(IniCase):
    """The files that a configuration names."""

    def test_good(self) -> None:
        """Nothing is said where all is there; manifests are judged by whom the caller names."""
        os.mkdir(os.path.join(self.folder, "services.d"))
        asked: list[str] = []

        def manifests(path: str) -> list[str]:
            asked.append(path)
            return ["bad.yaml:3: is no YAML"]

        loaded = self.load(LOCAL)
        self.assertEqual(config.checkFiles(loaded), [])
        self.assertEqual(config.checkFiles(loaded, manifests), ["bad.yaml:3: is no YAML"])
        self.assertEqual(asked, [os.path.join(self.folder, "services.d")])

    def test_missing(self) -> None:
        """What is missing, empty or no PEM is told with its section and key."""
        for name, text in (("empty.crt", " \n"), ("odd.key", "secret")):
            with open(os.path.join(self.folder, name), "w") as file:
                file.write(text)
        loaded = self.load(
            f"{LOCAL}[source:c]\ntype = api\nserver = https://h\ntoken-file = token\n"
            "client-certificate = empty.crt\nclient-key = odd.key\n"
        )
        faults = config.checkFiles(loaded)
        self.assertEqual(len(faults), 4)
        self.assertIn("[source:local] path", faults[0])
        self.assertIn("[source:c] token-file", faults[1])
        self.assertIn("cannot be read: No such file or directory", faults[1])
        self.assertIn("is empty", faults[2])
        self.assertIn("is no PEM file", faults[3])
        self.assertNotIn("secret", "".join(faults))

    def test_accessLog(self) -> None:
        """An access log that could not be written is a warning, whatever is in its way; nothing is made or changed."""
        with open(os.path.join(self.folder, "file"), "w") as file:
            file.write("kept")
        os.mkdir(os.path.join(self.folder, "folder"))
        for name, reason in (
            ("new", ""), ("file", ""), ("nowhere/log", "No such file or directory"), ("folder", "Is a directory"),
            ("file/log", "Not a directory"),
        ):  # fmt: skip
            loaded = self.load(f"{LOCAL}[userspace]\naccess-log = {name}\n")
            path = os.path.join(self.folder, name)
            told = f"[userspace] access-log = {path}: cannot be written: {reason}; its lines are lost until it can"
            self.assertEqual(config.fileWarnings(loaded), [told] if reason else [], name)
        self.assertNotIn("new", os.listdir(self.folder))
        self.assertEqual(config.fileWarnings(self.load(LOCAL)), [])
        self.patch(os, "access", lambda path, mode: False)
        for name in ("new", "file"):
            loaded = self.load(f"{LOCAL}[userspace]\naccess-log = {name}\n")
            self.assertIn(f"/{name}: cannot be written: Permission denied", config.fileWarnings(loaded)[0])

    def test_outsideCluster(self) -> None:
        """in-cluster asks for what every pod has."""
        self.patch(reading, "SERVICE_ACCOUNT", self.folder)
        loaded = self.load("[source:c]\ntype = api\nin-cluster = yes\n")
        faults = config.checkFiles(loaded, environ={})
        self.assertEqual(len(faults), 3)
        self.assertIn("KUBERNETES_SERVICE_HOST is not set", faults[2])
        loaded = self.load("[source:c]\ntype = api\nin-cluster = yes\nserver = https://192.0.2.1:6443\n")
        self.assertEqual(len(config.checkFiles(loaded, environ={})), 2)

    def test_access(self) -> None:
        """Whoever knows how to reach an API server is asked, but not about files that cannot be read."""
        with open(os.path.join(self.folder, "good"), "w") as file:
            file.write("{}")
        asked: list[str] = []

        def access(name: str, options: ApiOptions, environ: object) -> None:
            asked.append(name)
            raise NotAvailable("current-context is not set at https://me:hunter2@host")

        loaded = self.load(
            "[source:a]\ntype = api\nkubeconfig = good\n[source:b]\ntype = api\nkubeconfig = missing\n"
        )
        faults = config.checkFiles(loaded, access=access)
        self.assertEqual(asked, ["a"])
        self.assertEqual(faults[0], "[source:a] current-context is not set at https://***@host")
        self.assertEqual(len(faults), 2)


class ValueTests(SynchronousTestCase):
    """Single values, and any text at all."""

    @settings(max_examples=200, deadline=None)
    @given(st.integers(0, 86_400_000))
    def test_durations(self, milliseconds: int) -> None:
        """Every duration is read as what it was written as."""
        seconds = milliseconds / 1000
        self.assertEqual(readDuration(writeDuration(seconds)), seconds)

    @settings(max_examples=200, deadline=None)
    @given(st.text(st.sampled_from("[]=;# \n\tkproxymde:1\x00é"), max_size=60))
    def test_anyText(self, text: str) -> None:
        """No text makes the reader fail, and every line is an entry, a section, a comment, blank or at fault."""
        sections, faults = parseIni(text)
        for section in sections.values():
            for key, entry in section.entries.items():
                self.assertEqual((key, entry.key), (entry.key, entry.key.strip()))
                self.assertNotIn(" ;", entry.value)
        for fault in faults:
            self.assertTrue(1 <= fault.line <= text.count("\n") + 1)
