"""
kproxy: the node service proxy of Kubernetes as a Twisted daemon.

:mod:`twisted_kproxy.interfaces` names every part, and is the page to read first.
"""

__version__ = "0.1.0"
