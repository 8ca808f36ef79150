"""Where a server listens: who can reach an address, and which port is free."""

import ipaddress
import os
import socket
from collections.abc import Sequence


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def take_port(host: str, ports: Sequence[int]) -> socket.socket:
    """Take the first free port; whoever serves calls the socket's own `listen`.

    Args:
        host: a name or an address of this machine.
        ports: to try, in this order.

    Raises:
        OSError: there is no such address here, or all ports are taken.
    """
    name = host.strip("[]")
    reason = "no such address"
    for port in ports:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            taken = socket.socket(family, kind, protocol)
        except OSError as error:
            reason = error.strerror or reason
            break
        try:
            if os.name == "posix":  # one that was left a moment ago is free; on Windows, so is any other
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
        except OSError as error:
            taken.close()
            reason = error.strerror or reason
            continue
        return taken
    tried = f"port {ports[0]}" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]}"
    raise OSError(f"cannot listen on {host}, {tried}: {reason}; choose another --host or --port")
