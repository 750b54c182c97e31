"""Addresses that no listing may lead to: the machine's own link, where clouds keep credentials."""

from __future__ import annotations

import ipaddress
import socket

# Metadata services outside the link-local networks: names, AWS over IPv6, Alibaba Cloud.
_NAMES = {"metadata.google.internal", "metadata.goog", "metadata", "instance-data"}
_ADDRESSES = {ipaddress.ip_address("fd00:ec2::254"), ipaddress.ip_address("100.100.100.200")}


def is_link_local(host: str) -> bool:
    """Return whether *host*, a name or an address in any notation, is of the machine's own link.

    Loopback is not. Names are not resolved: the address behind one is known once it is connected.
    """
    host = host.strip("[]").rstrip(".").lower()
    if host in _NAMES:
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))  # such as 0xA9FEA9FE
        except (OSError, UnicodeError):
            return False
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    return address.is_link_local or address in _ADDRESSES
