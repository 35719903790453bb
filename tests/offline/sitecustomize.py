"""Refuse every connection that leaves this machine.

Python imports a module of this name at start-up, so a test run that puts this folder on
PYTHONPATH blocks the network in each Python process it starts: notebook kernels, JupyterLab,
commands. Loopback addresses and Unix sockets stay open; kernels and browsers talk over them.
"""

import ipaddress
import socket
import sys


class NetworkBlocked(OSError):
    """A test tried to reach another machine."""


# One class in a process: a worker of pytest-xdist has this file under two names, as it starts with
# it on PYTHONPATH and tests import it from its folder.
NetworkBlocked = vars(socket).setdefault("peftlab_blocked", NetworkBlocked)


def is_local(address) -> bool:
    """Whether a socket address stays on this machine; a Unix socket's address is no tuple."""
    if not isinstance(address, tuple):
        return True
    host = address[0]
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost"):
        return True
    try:
        ip = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    return ip.is_loopback or ip.is_unspecified


def refuse_unless_local(address) -> None:
    if not is_local(address):
        raise NetworkBlocked(f"peftlab's tests run offline; something asked for {address!r}")


def guarded(method, find_address):
    def call(self, *arguments):
        refuse_unless_local(find_address(arguments))
        return method(self, *arguments)

    return call


def block() -> None:
    """Replace the ways a Python socket reaches out, once."""
    if getattr(socket, "peftlab_offline", False):
        return
    resolve = socket.getaddrinfo

    def getaddrinfo(host, *arguments, **options):
        refuse_unless_local((host,))
        return resolve(host, *arguments, **options)

    socket.getaddrinfo = getaddrinfo
    socket.socket.connect = guarded(socket.socket.connect, lambda a: a[0])
    socket.socket.connect_ex = guarded(socket.socket.connect_ex, lambda a: a[0])
    socket.socket.sendto = guarded(socket.socket.sendto, lambda a: a[-1])
    socket.peftlab_offline = True


block()
# nbformat's validator would build a grammar of Unicode addresses, a second of every kernel's start,
# that no notebook's schema asks for. It does without where this package cannot be imported.
sys.modules["rfc3987_syntax"] = None
