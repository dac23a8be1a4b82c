"""Whatever goes wrong, and whoever tells of it: no token, password or key comes out."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from base64 import b64encode
from typing import Any
from urllib.parse import quote

import treq
import yaml
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import deferLater
from twisted.internet.utils import getProcessOutputAndValue
from twisted.web.server import Site

from tests.fakes.pki import Authority
from tests.integration.apirig import Api, ApiCase

TWISTD = os.path.join(os.path.dirname(sys.executable), "twistd")
BETA = "client.authentication.k8s.io/v1beta1"
TOKEN, FILE_TOKEN, PLUGIN_TOKEN, PASSWORD, ENV_PASSWORD, LOCATION_PASSWORD = (
    "kubeconfig-t0k3n-Zx81", "file-t0k3n-Qy72", "plugin-t0k3n-Wk63", "pr0xy/p@ss-Ev54", "env-p@ss-Rn45",
    "l0cation-Tm36",
)


class _Echo(Api):
    """Says back what it was told, in an error."""

    def render_GET(self, request: Any) -> Any:
        self.requests.append({})
        request.setResponseCode(500)
        header = request.getHeader("authorization")
        said = f"cannot understand {header} in your request: {header.removeprefix('Bearer ')} is nobody's"
        request.setHeader("content-type", "application/json")
        return json.dumps({"kind": "Status", "code": 500, "reason": "InternalError", "message": said}).encode()


class _Daemon(ProcessProtocol):
    def __init__(self) -> None:
        self.said = b""
        self.ended: Deferred[Any] = Deferred()

    def outReceived(self, data: bytes) -> None:
        self.said += data

    errReceived = outReceived

    def processEnded(self, reason: Any) -> None:
        self.ended.callback(reason.value)


class SecretTests(ApiCase):
    """A daemon for whose sources everything goes wrong, each in another way."""

    timeout = 90

    def kubeconfig(self, name: str, server: str, cluster: dict[str, Any], user: dict[str, Any]) -> str:
        document = {
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": server, "certificate-authority": self.ca, **cluster}}],
            "users": [{"name": "u", "user": user}],
        }
        return self.write(name, yaml.safe_dump(document))

    def sources(self) -> dict[str, str]:
        """Name → the lines of each source; the secrets to look for gather in ``secrets``."""
        self.ca = self.write("ca", self.authority.certificate)
        certificate, key = self.authority.issue("system:node:n")
        self.secrets = {
            TOKEN, FILE_TOKEN, PLUGIN_TOKEN, PASSWORD, ENV_PASSWORD, LOCATION_PASSWORD,
            *(line for line in key.decode().splitlines() if not line.startswith("-----")),
            *(b64encode(f"me:{it}".encode()).decode() for it in (PASSWORD, ENV_PASSWORD)),
            *(quote(it, safe="") for it in (PASSWORD, ENV_PASSWORD)),
            b64encode(key).decode(),
        }
        self.api.accepted = set()
        echo, redirect = _Echo(), Api()
        redirect.answer = (302, {"location": f"https://me:{LOCATION_PASSWORD}@127.0.0.1:1/"}, b"")
        good = self.serve("127.0.0.1")
        echoing = self.serve("127.0.0.1", site=Site(echo))
        redirecting = self.serve("127.0.0.1", site=Site(redirect))
        foreign = self.serve(pair=Authority("mallory").issue("x", "127.0.0.1"))
        _, host, port = self.proxy("connect", users={"nobody": "x"})
        environment, otherHost, otherPort = self.proxy("socks5", users={"nobody": "x"})
        self.environment = environment
        self.environ = {"HTTPS_PROXY": f"socks5://me:{quote(ENV_PASSWORD, safe='')}@{otherHost}:{otherPort}"}
        plugin = self.script(
            "plugin",
            f"token = '{PLUGIN_TOKEN}'\nprint('debug: the token is', token, file=sys.stderr)\n"
            "print(json.dumps({'kind': 'ExecCredential', 'status': {'token': token}}))\n"
            "print('and more', file=sys.stderr)",
        )
        half = self.script(
            "half", f"print('{{\"status\": {{\"token\": \"{PLUGIN_TOKEN}')\nsys.exit('no {PLUGIN_TOKEN}')",
        )
        pair = {
            "client-certificate-data": b64encode(certificate).decode(), "client-key-data": b64encode(key).decode(),
        }
        proxy = {"proxy-url": f"http://me:{quote(PASSWORD, safe='')}@{host}:{port}"}
        tokenFile = self.write("token", FILE_TOKEN)

        def spec(command: str) -> dict[str, Any]:
            return {"exec": {"command": command, "apiVersion": BETA, "env": [{"name": "A_TOKEN", "value": TOKEN}]}}

        return {
            "refused": f"kubeconfig = {self.kubeconfig('k1', good, {}, {'token': TOKEN})}",
            "echoed": f"kubeconfig = {self.kubeconfig('k2', echoing, {}, {'token': TOKEN})}",
            "redirected": f"server = {redirecting}\nca-file = {self.ca}\ntoken-file = {tokenFile}",
            "echoed-file": f"server = {echoing}\nca-file = {self.ca}\ntoken-file = {tokenFile}",
            "foreign": f"kubeconfig = {self.kubeconfig('k3', foreign, {}, pair)}",
            "proxied": f"kubeconfig = {self.kubeconfig('k4', good, proxy, {'token': TOKEN})}",
            "section": f"server = {good}\nca-file = {self.ca}\n"
                       f"proxy-url = http://me:{quote(PASSWORD, safe='')}@{host}:{port}",
            "environment": f"server = https://192.0.2.1\nca-file = {self.ca}\ntoken-file = {tokenFile}",
            "plugin": f"kubeconfig = {self.kubeconfig('k5', good, {}, spec(plugin))}",
            "half": f"kubeconfig = {self.kubeconfig('k6', good, {}, spec(half))}",
        }

    def configure(self, sources: dict[str, str], form: str) -> str:
        # Until the daemon takes it somebody else might get that port: of 127.0.0.1, but not of an address of our own.
        high, low = divmod(os.getpid(), 250)
        self.address = f"127.{1 + high // 250 % 250}.{1 + high % 250}.{1 + low}"
        with socket.create_server((self.address, 0)) as free:
            self.port = free.getsockname()[1]
        text = f"[kproxy]\nnode-name = n\nlog-format = {form}\n[rules]\nwriter = none\n[health]\nbind =\n"
        text += f"[metrics]\nbind = {self.address}:{self.port}\n"
        text += "".join(f"[source:{name}]\ntype = api\n{lines}\n" for name, lines in sources.items())
        return self.write("kproxy.ini", text)

    def assertNothingOf(self, text: str, where: str) -> None:
        for secret in self.secrets:
            at = text.find(secret)
            self.assertEqual(at, -1, f"{secret} in {where}: {text[max(0, at - 200) : at + 200]!r}")

    async def page(self, name: str) -> str:
        response = await treq.get(f"http://{self.address}:{self.port}/{name}", persistent=False, timeout=5)
        self.assertEqual(response.code, 200)
        return str(await response.text())

    async def run_(self, sources: dict[str, str], form: str, *options: str) -> str:
        """A daemon until each source has failed; gives what it has said, pages included."""
        path = self.configure(sources, form)
        argv = [sys.executable, TWISTD, "-n", "--pidfile=", *options, "kproxy", "--config", path]
        daemon = _Daemon()
        env = {**os.environ, **self.environ, "PYTHONUNBUFFERED": "1"}
        process: Any = reactor.spawnProcess(daemon, argv[0], argv, env, self.folder)  # type: ignore[attr-defined]
        self.addCleanup(lambda: None if daemon.ended.called else process.signalProcess("KILL"))
        pages = {}
        for _ in range(400):
            await deferLater(reactor, 0.05)  # type: ignore[arg-type]
            if daemon.ended.called:
                self.fail(f"it has ended: {daemon.said.decode()}")
            try:
                pages = {name: await self.page(name) for name in ("status", "configz", "metrics", "status?pretty")}
            except Exception:
                continue
            found = {it["name"]: it for it in json.loads(pages["status"])["sources"]}
            if all(kind["lastError"] for it in found.values() for kind in it["kinds"].values()):
                break
        else:
            self.fail(f"not every source came to fail: {pages}")
        self.errors = {it["name"]: it["kinds"]["Service"]["lastError"] for it in found.values()}
        process.signalProcess("TERM")
        ended = await daemon.ended
        if not isinstance(ended, ProcessDone):
            self.assertEqual(ended.signal, 15, daemon.said.decode())
        for name, text in pages.items():
            self.assertNothingOf(text, f"/{name}")
        said = daemon.said.decode()
        self.assertNothingOf(said, f"the log in form {form} {options}")
        return said

    async def test_everywhere(self) -> None:
        """Logs in each form and every page, while each source fails in its own way."""
        sources = self.sources()
        for form, *options in (
            ("text",), ("json",), ("text", "--logger=twisted_kproxy.logs.journal"),
            ("json", "--logger=twisted_kproxy.logs.journal"),
        ):
            said = await self.run_(sources, form, *options)
            for name, part in (
                ("refused", "401 Unauthorized"), ("echoed", "cannot understand"), ("redirected", "is not followed"),
                ("foreign", "issued by mallory"), ("proxied", "407"), ("section", "407"),
                ("environment", "does not take user name"), ("plugin", "printed another apiVersion"),
                ("half", "exit status 1"),
            ):
                self.assertRegex(self.errors[name], part)
            # The lines are there: it is not for want of anything said that no secret is.
            for part in ("cannot understand", "the token is \\*\\*\\*", "issued by mallory", "and more"):
                self.assertTrue(re.search(part, said), said)
        self.assertTrue(self.environment.connections)

    async def test_check(self) -> None:
        """What --check prints, of good files and of bad ones."""
        sources = self.sources()
        broken = self.write("k7", f"token: *{TOKEN}\n")
        noCertificate = {"client-key-data": b64encode(FILE_TOKEN.encode()).decode()}
        half = self.kubeconfig("k8", "https://192.0.2.1", {}, noCertificate)
        bad = self.kubeconfig("k9", f"https://me:{PASSWORD}@192.0.2.1", {}, {"token": f"{TOKEN} x"})
        proxy = self.kubeconfig("k10", "https://a", {"proxy-url": f"gopher://me:{quote(PASSWORD, safe='')}@h"}, {})
        locked = self.write("locked", Authority().issue("x", password=b"x")[1])
        certificate = self.write("c", self.authority.certificate)
        for extra in (
            {}, {"a": f"kubeconfig = {broken}"}, {"a": f"kubeconfig = {half}"}, {"a": f"kubeconfig = {bad}"},
            {"a": f"kubeconfig = {proxy}"}, {"a": f"server = https://me:{quote(PASSWORD, safe='')}@192.0.2.1"},
            {"a": f"server = https://a\nclient-certificate = {certificate}\nclient-key = {locked}"},
            {"a": f"server = https://a\nproxy-url = gopher://me:{quote(PASSWORD, safe='')}@h"},
        ):
            path = self.configure({**sources, **extra}, "text")
            argv = (TWISTD, "kproxy", "--check", "--config", path)
            env = {**os.environ, **self.environ}
            out, err, code = await getProcessOutputAndValue(sys.executable, argv, env, self.folder)
            self.assertEqual(code, 1 if extra else 0, err)
            self.assertNothingOf(out.decode() + err.decode(), f"--check with {extra}")
            if extra:
                self.assertTrue(err.strip())
