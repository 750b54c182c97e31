"""Addresses that no listing may lead to: the machine's own link, where clouds keep credentials."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from urllib.parse import unquote

# Metadata services outside the link-local networks: by name; over IPv6, of AWS, EKS and Google
# Cloud; of Alibaba Cloud and Azure.
_NAMES = {"metadata.google.internal", "metadata.goog", "metadata", "instance-data"}
_ADDRESSES = {
    ipaddress.ip_address(text)
    for text in (
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
        "100.100.100.200",
        "168.63.129.16",
    )
}
# RFC 6052 and RFC 4291, 2.5.5.1: an IPv4 address in the last 32 bits.
_WITH_IPV4 = tuple(map(ipaddress.IPv6Network, ("64:ff9b::/96", "::/96")))


def is_link_local(host: str) -> bool:
    """Return whether *host*, a name or an address in any notation, is of the machine's own link.

    Loopback is not. Names are not resolved: the address behind one is known once it is connected.
    """
    host = unquote(host.strip("[]"))
    with contextlib.suppress(UnicodeError):  # dots and digits that a proxy or a resolver maps
        host = host if host.isascii() else host.encode("idna").decode()
    host = host.rstrip(".").lower()
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
        address = _ipv4_in(address) or address
    return address.is_link_local or address in _ADDRESSES


def _ipv4_in(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if any(address in network for network in _WITH_IPV4):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour
