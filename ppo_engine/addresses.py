"""Which network addresses a URL of a user's may lead to.

A request that a service sends for somebody can reach what they cannot: its own machine, its neighbours, the
address under which a cloud tells machines their credentials (server-side request forgery). Knows addresses
only; it asks nobody what a name stands for.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Literal, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Standing = Literal["public", "private", "refused"]

_METADATA = {ip_address(text) for text in ("100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254")}
"""Where clouds answer with credentials, beside the link-local 169.254.169.254."""
_TRANSLATED = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))
"""NAT64 (RFC 6052, RFC 8215): the last 32 bits are an IPv4 address."""
_GLOBAL_UNICAST = IPv6Network("2000::/3")
NO_SERVERS = "nothing is asked for at a link-local, multicast, or reserved address, nor at a cloud's own"
"""The rule that such addresses break."""
_MASK = 2**32 - 1


def address_of(host: str) -> Address | None:
    """The address that a URL's host is; None: it is a name. An IPv6 address may stand in brackets."""
    try:
        return ip_address(host.strip("[]"))
    except ValueError:
        return None


def standing(address: Address) -> Standing:
    """Whether an address is everybody's, somebody's own, or one that no server of a user's has.

    An IPv6 address that stands for IPv4 addresses is as bad as the worst of them.
    """
    if _is_refused(address):
        return "refused"
    inside = {standing(one) for one in _inside(address)}
    if "refused" in inside:
        return "refused"
    is_public = _is_public(address) or (bool(inside) and _stands_for_another(address))
    return "public" if is_public and "private" not in inside else "private"


def _is_refused(address: Address) -> bool:
    return (
        address in _METADATA
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or (isinstance(address, IPv4Address) and address.is_reserved)
    )


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    return address.is_global


def _stands_for_another(address: Address) -> bool:
    """Whether an IPv6 address is but another way to write an IPv4 address, or leads to one by NAT64."""
    return isinstance(address, IPv6Address) and (
        address.ipv4_mapped is not None or any(address in network for network in _TRANSLATED)
    )


def _inside(address: Address) -> Iterator[IPv4Address]:
    """The IPv4 addresses that an IPv6 address stands for."""
    if isinstance(address, IPv4Address):
        return
    if _stands_for_another(address):
        yield IPv4Address(int(address) & _MASK)
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo
