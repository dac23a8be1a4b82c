"""The real kubectl, in a namespace, talking to the fake API server."""

from __future__ import annotations

import json
import os
import shutil
import signal
from typing import Any

from .daemon import Program
from .network import Network

BINARY = os.environ.get("KUBECTL") or shutil.which("kubectl")
MISSING = "" if BINARY else "there is no kubectl (Debian: apt-get install kubernetes-client)"
# Where it would keep files, look for a cluster, or behave in another way.
_UNSET = ("KUBECONFIG", "KUBERNETES_MASTER", "KUBECACHEDIR", "KUBECTL_EXTERNAL_DIFF", "KUBE_EDITOR")


class Kubectl:
    """
    :param server: the URL of the API server.
    :param name: the namespace in which it runs.
    """

    def __init__(self, rig: Network, server: str, name: str = "api") -> None:
        assert BINARY, MISSING
        self._rig = rig
        self._name = name
        self._env = {key: value for key, value in os.environ.items() if key not in _UNSET} | {"HOME": rig.folder}
        cache = os.path.join(rig.folder, "kube-cache")
        self._start = [BINARY, "--server", server, "--kubeconfig", "/dev/null", "--cache-dir", cache]
        self.minor = int(json.loads(self("version", "-o", "json"))["clientVersion"]["minor"].rstrip("+"))

    def __call__(self, *words: str, input: Any = None, code: int = 0) -> str:
        """
        Run it, with objects (or text) as its standard input. Gives its output, with its complaints where it fails.

        :param code: how it has to end.
        :raise AssertionError: where it ends otherwise.
        """
        if input is not None and not isinstance(input, str):
            items = input if isinstance(input, list) else [input]
            input = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
        done = self._rig.run(
            self._name, [*self._start, *words], check=False, input=input if input is not None else "", env=self._env
        )
        said = done.stdout + done.stderr
        if done.returncode != code:
            raise AssertionError(f"kubectl {' '.join(words)} ended with {done.returncode}, not {code}:\n{said}")
        return said if code else done.stdout

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """One object."""
        it: dict[str, Any] = json.loads(self("get", kind, name, "-o", "json"))
        return it

    def setStatus(self, kind: str, name: str, status: dict[str, Any]) -> None:
        """Change the status of an object; kubectl has words for that only since 1.24."""
        if self.minor >= 24:
            patch = json.dumps({"status": status})
            self("patch", kind, name, "--subresource=status", "--type=merge", "-p", patch)
        else:
            text = json.dumps({**self.get(kind, name), "status": status})
            self("replace", "--raw", f"/api/v1/namespaces/default/{kind}/{name}/status", "-f", "-", input=text)

    def watch(self, *words: str) -> Program:
        """``kubectl get … --watch``, until it is stopped."""
        return Program(self._rig, self._name, [*self._start, "get", *words, "--watch"], env=self._env)

    @staticmethod
    def stop(watch: Program) -> None:
        watch.stop(signal.SIGINT)
