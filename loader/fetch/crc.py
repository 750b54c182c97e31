"""CRC64NVME, the checksum that S3 itself stores: 25 GB/s, and pieces combine.

awscrt is loaded at the first use: the first request is on its way by then.
"""

from __future__ import annotations

Data = bytes | memoryview


def crc64nvme(data: Data, crc: int = 0) -> int:
    """Return the CRC of what *crc* is of, with *data* behind it."""
    from awscrt import checksums

    return int(checksums.crc64nvme(data, crc))


def crc32(data: Data, crc: int = 0) -> int:
    """Return the CRC-32 in the same way."""
    from awscrt import checksums

    return int(checksums.crc32(data, crc))


def crc32c(data: Data, crc: int = 0) -> int:
    """Return the CRC-32C in the same way."""
    from awscrt import checksums

    return int(checksums.crc32c(data, crc))


def combine_crc64nvme(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC of two pieces, one behind the other, from theirs."""
    from awscrt import checksums

    return int(checksums.combine_crc64nvme(first, second, second_bytes))


def combine_crc32(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32 of two pieces."""
    from awscrt import checksums

    return int(checksums.combine_crc32(first, second, second_bytes))


def combine_crc32c(first: int, second: int, second_bytes: int) -> int:
    """Return the CRC-32C of two pieces."""
    from awscrt import checksums

    return int(checksums.combine_crc32c(first, second, second_bytes))
