"""Every kind of address, by where it leads."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_engine.addresses import address_of, standing


@pytest.mark.parametrize(
    ("expected", "addresses"),
    [
        ("public", "8.8.8.8 1.1.1.1 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808 2002:808:808::1"),
        (
            "private",
            "10.0.0.1 172.16.0.1 192.168.1.1 127.0.0.1 127.8.8.8 100.64.0.1 192.0.2.1 198.18.0.1 0.1.2.3",
        ),
        ("private", "::1 fd12::1 fec0::1 2001:db8::1 ::127.0.0.1 ::8.8.8.8 ::ffff:10.0.0.1 ::ffff:127.0.0.1"),
        ("private", "64:ff9b::a00:1 64:ff9b:1::a00:1 2002:a00:1:: 2001:0:808:808::f7f7:f7f7 5f00::1"),
        (
            "refused",
            "169.254.169.254 169.254.1.1 100.100.100.200 0.0.0.0 224.0.0.1 240.0.0.1 255.255.255.255",
        ),
        ("refused", ":: fe80::1 fe80::1%eth0 ff02::1 fd00:ec2::254 fd20:ce::254"),
        ("refused", "::ffff:169.254.169.254 64:ff9b::a9fe:a9fe 2002:a9fe:a9fe:: ::ffff:0.0.0.0"),
    ],
)
def test_where_an_address_leads(expected: str, addresses: str) -> None:
    found = {text: standing(address) for text in addresses.split() if (address := address_of(text))}
    assert found == dict.fromkeys(addresses.split(), expected)


@given(st.ip_addresses(v=4))
def test_another_way_of_writing_an_address_is_no_way_around(address: IPv4Address) -> None:
    for prefix in ("::ffff:0:0", "64:ff9b::"):
        assert standing(IPv6Address(int(IPv6Address(prefix)) + int(address))) == standing(address)


def test_names_are_no_addresses() -> None:
    assert address_of("example.com") is None
    assert address_of("2130706433") is None  # that it is one, only a look-up tells
    assert address_of("[::1]") == IPv6Address("::1")
