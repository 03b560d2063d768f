"""Damage to bytes, as pure functions of the bytes and a random generator."""

from collections.abc import Callable

import numpy as np

Rng = np.random.Generator
Mutation = Callable[[Rng, bytes], bytes]


def place(rng: Rng, data: bytes) -> int:
    return int(rng.integers(len(data) or 1))


def flip_bit(rng: Rng, data: bytes) -> bytes:
    return xor(data, place(rng, data), 1 << int(rng.integers(8)))


def set_byte(rng: Rng, data: bytes) -> bytes:
    return xor(data, place(rng, data), int(rng.integers(1, 256)))


def cut(rng: Rng, data: bytes) -> bytes:
    """The end is gone."""
    return data[: place(rng, data)]


def drop(rng: Rng, data: bytes) -> bytes:
    """A few bytes are gone."""
    at = place(rng, data)
    return data[:at] + data[at + int(rng.integers(1, 40)) :]


def insert(rng: Rng, data: bytes) -> bytes:
    at = place(rng, data)
    return data[:at] + rng.bytes(int(rng.integers(1, 40))) + data[at:]


def repeat(rng: Rng, data: bytes) -> bytes:
    """A stretch is there twice."""
    at = place(rng, data)
    return data[:at] + data[at : at + int(rng.integers(1, 600))] + data[at:]


def blank(rng: Rng, data: bytes) -> bytes:
    """A stretch is zeros, as of a lost block of a disk."""
    at = place(rng, data)
    end = min(len(data), at + int(rng.integers(1, 600)))
    return data[:at] + bytes(end - at) + data[end:]


def append(rng: Rng, data: bytes) -> bytes:
    return data + rng.bytes(int(rng.integers(1, 60)))


ANY: tuple[Mutation, ...] = (flip_bit, set_byte, cut, drop, insert, repeat, blank, append)


def damaged(rng: Rng, data: bytes) -> bytes:
    """One to three mutations of any kind."""
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        data = ANY[int(rng.integers(len(ANY)))](rng, data)
    return data


def xor(data: bytes, at: int, mask: int) -> bytes:
    changed = bytearray(data)
    if changed:
        changed[at] ^= mask
    return bytes(changed)
