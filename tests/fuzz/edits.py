"""Damage that hypothesis draws and shrinks: stretches of a file replaced by other bytes."""

from hypothesis import strategies as st

Edit = tuple[float, int, bytes]
"""Where (0 the first byte, 1 the last), how many bytes go, and what comes instead."""

TEXT_BYTES = (b"", b",", b'"', b"'", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b" ", b"\t", b"-1", b"412")
TEXT_BYTES += (b"|", b":", b"{", b"[", b"}", b"NaN", b"1e999", b"null", b"true", b"/", b"..", b"\x0c", b"\xc2\xa0")


def edits(most: int = 3) -> st.SearchStrategy[list[Edit]]:
    new = st.one_of(st.sampled_from(TEXT_BYTES), st.binary(min_size=1, max_size=8))
    return st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from([0, 0, 1, 1, 1, 2, 8, 4000]), new), min_size=1, max_size=most
    )


def edited(data: bytes, changes: list[Edit]) -> bytes:
    for where, gone, new in changes:
        at = int(where * len(data))
        data = data[:at] + new + data[at + gone :]
    return data
