"""Tests run offline: only this machine's loopback can be reached, unless a test is marked `network`."""

import ipaddress
import os
import socket

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def _is_local(host: object) -> bool:
    if host in ("localhost", "", None):
        return True
    try:
        address = ipaddress.ip_address(str(host))
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(autouse=True)
def _offline(request, monkeypatch):
    if request.node.get_closest_marker("network"):
        return

    def guard(name):
        original = getattr(socket.socket, name)

        def connect(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_local(address[0]):
                raise OSError(f"tests are offline: refused to connect to {address}")
            return original(self, address)

        return connect

    def getaddrinfo(host, *args, **kwargs):
        text = host.decode() if isinstance(host, bytes) else host
        numeric = ":" in (text or "") or (text or "").replace(".", "").isdigit()
        if not (_is_local(text) or numeric):
            raise socket.gaierror(socket.EAI_NONAME, f"tests are offline: refused to look up {host!r}")
        return lookup(host, *args, **kwargs)

    lookup = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", guard("connect"))
    monkeypatch.setattr(socket.socket, "connect_ex", guard("connect_ex"))
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
