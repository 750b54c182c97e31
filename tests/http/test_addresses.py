"""The machine's own link, however it is written."""

from __future__ import annotations

import pytest

from loader.http.addresses import is_link_local


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "169.254.170.2",
        "0xA9FEA9FE",
        "2852039166",
        "0251.0376.0251.0376",
        "fe80::1",
        "[fe80::1]",
        "fe80::1%eth0",
        "::ffff:169.254.169.254",
        "fe80::1%25eth0",
        "::169.254.169.254",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::169.254.169.254",
        "64:ff9b:1:ffff::a9fe:a9fe",
        "64:ff9b:1:a9fe:a9:fe00::",
        "64:ff9b:1:3a9:fe:a9fe::",
        "64:ff9b:1:77:a9:fea9:fe00:0",
        "::ffff:0:169.254.169.254",
        "::ffff:168.63.129.16",
        "2002:a9fe:a9fe::1",
        "2001:0:a9fe:a9fe::1",
        "2001:0:102:304::5601:5601",
        "2001:db8::5efe:169.254.169.254",
        "fd00:c1::a9fe:a9fe",
        "192.0.0.192",
        "169。254。169。254",
        "①⑥⑨.254.169.254",
        "169%2E254.169.254",
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
        "168.63.129.16",
        "100.100.100.200",
        "metadata.google.internal.",
        "Metadata",
    ],
)
def test_link_local(host: str) -> None:
    assert is_link_local(host)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "::1",
        "localhost",
        "10.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::10.0.0.1",
        "2001:db8::a9fe:a9fe",
        "2001:db8:1:a9fe:a9:fe00::",
        "64:ff9b:1:808:8:800::",
        "a.example",
        "é.example",
        "x" * 70 + "é",
        "%",
        "a\0b",
        "a%00b",
        "",
    ],
)
def test_elsewhere(host: str) -> None:
    assert not is_link_local(host)
