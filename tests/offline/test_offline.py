"""The block itself: nothing leaves the machine, loopback works, children inherit both."""

import os
import socket
import subprocess
import sys

import pytest
from offline.sitecustomize import NetworkBlocked

ELSEWHERE = ("192.0.2.1", 80)  # an address reserved for documentation


def test_this_process_reaches_no_other_machine():
    with pytest.raises(NetworkBlocked):
        socket.create_connection(ELSEWHERE, timeout=1)
    with pytest.raises(NetworkBlocked), socket.socket() as s:
        s.connect(ELSEWHERE)
    with pytest.raises(NetworkBlocked), socket.socket() as s:
        s.connect_ex(ELSEWHERE)
    with pytest.raises(NetworkBlocked), socket.socket(type=socket.SOCK_DGRAM) as s:
        s.sendto(b"hello", ELSEWHERE)
    with pytest.raises(NetworkBlocked):
        socket.getaddrinfo("huggingface.co", 443)


def test_loopback_and_socket_pairs_work():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            peer, _ = server.accept()
            with peer:
                client.sendall(b"x")
                assert peer.recv(1) == b"x"
    a, b = socket.socketpair()
    with a, b:
        a.sendall(b"y")
        assert b.recv(1) == b"y"


def test_a_child_process_is_blocked_too():
    code = f"import socket; socket.create_connection({ELSEWHERE!r}, timeout=1)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode != 0
    assert "NetworkBlocked" in child.stderr


def test_the_hub_is_told_to_stay_offline():
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
