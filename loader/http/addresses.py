"""Addresses that no listing may lead to: the machine's own link, where clouds keep credentials."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from urllib.parse import unquote

# Metadata services outside the link-local networks: by name; over IPv6, of AWS, EKS, Google Cloud,
# Oracle and Scaleway; of Alibaba Cloud, Azure and Oracle.
_NAMES = {
    "metadata.google.internal",
    "metadata.goog",
    "metadata",
    "instance-data",
    "instance-data.ec2.internal",
}
_ADDRESSES = {
    ipaddress.ip_address(text)
    for text in (
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
        "fd00:c1::a9fe:a9fe",
        "fd00:42::42",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
    )
}
# An IPv4 address in the last 32 bits: RFC 6052, RFC 8215, RFC 2765 and RFC 4291, 2.5.5.1.
_WITH_IPV4 = tuple(
    map(ipaddress.IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "::ffff:0:0:0/96", "::/96"))
)
# Where its bytes begin after shorter prefixes of RFC 6052, without the octet 8, which none is in.
_LOCAL_NAT64, _PLACES = ipaddress.IPv6Network("64:ff9b:1::/48"), (6, 7, 8)
_ISATAP = (0x00005EFE, 0x02005EFE)  # RFC 5214, 6.1: before the IPv4 address in any network


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
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))  # such as 0xA9FEA9FE
        except (OSError, ValueError):  # also for a NUL
            return False
    found = [address]
    if isinstance(address, ipaddress.IPv6Address):
        found += _ipv4_in(address)
    return any(one.is_link_local or one in _ADDRESSES for one in found)


def _ipv4_in(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """Return the IPv4 addresses that a translator or a tunnel may take *address* for."""
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    last = int(address) & 0xFFFFFFFF
    if any(address in network for network in _WITH_IPV4) or (
        int(address) >> 32 & 0xFFFFFFFF in _ISATAP
    ):
        found.append(ipaddress.IPv4Address(last))
    if address in _LOCAL_NAT64:
        octets = address.packed[:8] + address.packed[9:]
        found += [ipaddress.IPv4Address(octets[place : place + 4]) for place in _PLACES]
    return [one for one in found if one is not None]
