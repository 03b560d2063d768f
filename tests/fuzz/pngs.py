"""PNG files taken apart and put together again, and mutations of them with what must come of each."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tests.fuzz import mutate
from tests.fuzz.mutate import Rng

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")

REFUSED = "refused"
"""The file must be an error."""
SAME = "same"
"""It must give the pixels of the file that was changed."""
SAFE = "refused or same"
JUDGED = "refused or as Pillow reads it"
SHAPE = "refused or of its shape"
"""Nothing in the file can tell that pixels were damaged: they are only held to their shape."""

Chunk = tuple[bytes, bytes]


@dataclass(frozen=True)
class Base:
    """A good file and its grey pixels."""

    name: str
    data: bytes
    pixels: np.ndarray


@dataclass(frozen=True)
class Case:
    """A changed file and what must come of it."""

    name: str
    data: bytes
    expected: str


def pack(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def join(chunks: list[Chunk]) -> bytes:
    return SIGNATURE + b"".join(pack(kind, body) for kind, body in chunks)


def split(data: bytes) -> list[Chunk]:
    at, chunks = len(SIGNATURE), []
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    return chunks


def parts(data: bytes) -> list[tuple[bytes, int, int]]:
    """Kind, first byte and end of every chunk."""
    at, found = len(SIGNATURE), []
    for kind, body in split(data):
        found.append((kind, at, at + 12 + len(body)))
        at += 12 + len(body)
    return found


def stream(chunks: list[Chunk]) -> bytes:
    """The compressed pixels."""
    return b"".join(body for kind, body in chunks if kind == b"IDAT")


def with_stream(chunks: list[Chunk], compressed: bytes, num_parts: int = 1) -> list[Chunk]:
    """The chunks with other compressed pixels, in one IDAT or several."""
    first = [kind for kind, _ in chunks].index(b"IDAT")
    step = max(1, -(-len(compressed) // num_parts))
    pieces = [compressed[at : at + step] for at in range(0, len(compressed), step)]
    rest = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
    return [*rest[:first], *((b"IDAT", piece) for piece in pieces), *rest[first:]]


def with_header(chunks: list[Chunk], **fields: int) -> list[Chunk]:
    names = ("width", "height", "depth", "colour", "compression", "filter", "interlace")
    header = dict(zip(names, struct.unpack(">IIBBBBB", chunks[0][1]), strict=True)) | fields
    return [(b"IHDR", struct.pack(">IIBBBBB", *header.values())), *chunks[1:]]


def header_of(data: bytes) -> tuple[int, int, int, int]:
    """Width, height, depth and colour type."""
    return struct.unpack(">IIBB", data[16:26])


def bits_flipped(rng: Rng, base: Base) -> Case:
    data = mutate.flip_bit(rng, base.data)
    return Case("bit flipped", data, _after_damage(base.data, data))


def byte_set(rng: Rng, base: Base) -> Case:
    data = mutate.set_byte(rng, base.data)
    return Case("byte set", data, _after_damage(base.data, data))


def stretch_zeroed(rng: Rng, base: Base) -> Case:
    data = mutate.blank(rng, base.data)
    return Case("stretch zeroed", data, SAME if data == base.data else _after_damage(base.data, data))


def cut_short(rng: Rng, base: Base) -> Case:
    return Case("cut short", mutate.cut(rng, base.data), REFUSED)


def end_cut(rng: Rng, base: Base) -> Case:
    return Case("end mark cut", base.data[: -int(rng.integers(1, 13))], REFUSED)


def bytes_moved(rng: Rng, base: Base) -> Case:
    change = (mutate.drop, mutate.insert, mutate.repeat)[int(rng.integers(3))]
    data = change(rng, base.data)
    return Case(f"{change.__name__} of bytes", data, SAFE)


def garbage_behind(rng: Rng, base: Base) -> Case:
    return Case("trailing garbage", mutate.append(rng, base.data), SAME)


def another_behind(rng: Rng, base: Base) -> Case:
    return Case("another file behind", base.data + base.data[: mutate.place(rng, base.data)], SAME)


def garbage_before(rng: Rng, base: Base) -> Case:
    return Case("leading garbage", rng.bytes(int(rng.integers(1, 9))) + base.data, REFUSED)


def wrong_checksum(rng: Rng, base: Base) -> Case:
    found = parts(base.data)
    kind, _, end = found[int(rng.integers(len(found)))]
    data = mutate.xor(base.data, end - 1 - int(rng.integers(4)), int(rng.integers(1, 256)))
    return Case(f"wrong checksum of {kind!r}", data, REFUSED if kind in CRITICAL else SAFE)


def wrong_length(rng: Rng, base: Base) -> Case:
    found = parts(base.data)
    kind, start, _ = found[int(rng.integers(len(found)))]
    data = mutate.xor(base.data, start + int(rng.integers(4)), int(rng.integers(1, 256)))
    return Case(f"wrong length of {kind!r}", data, REFUSED if kind in CRITICAL else SAFE)


def larger(rng: Rng, base: Base) -> Case:
    """More lines than there are pixels for."""
    height = base.pixels.shape[0] + int(rng.integers(1, 4000))
    return Case("lines missing", join(with_header(split(base.data), height=height)), REFUSED)


def smaller(rng: Rng, base: Base) -> Case:
    """Fewer lines or columns: the file says so, and is read as it says."""
    width, height, *_ = header_of(base.data)
    fields = (
        {"height": int(rng.integers(1, height + 1))}
        if rng.random() < 0.5
        else {"width": int(rng.integers(1, width + 1))}
    )
    return Case(f"header says {fields}", join(with_header(split(base.data), **fields)), JUDGED)


def huge(rng: Rng, base: Base) -> Case:
    sides = (60_000, 32_769, 65_535, 1 << 31, (1 << 32) - 1)
    width, height = (sides[int(rng.integers(len(sides)))] for _ in range(2))
    return Case(f"{width} x {height}", join(with_header(split(base.data), width=width, height=height)), REFUSED)


def nothing(rng: Rng, base: Base) -> Case:
    fields = ({"width": 0}, {"height": 0}, {"width": 0, "height": 0})[int(rng.integers(3))]
    return Case(f"header says {fields}", join(with_header(split(base.data), **fields)), REFUSED)


def other_kind(rng: Rng, base: Base) -> Case:
    """Another depth, colour type or interlacing than the pixels have: read as it says, if it can be."""
    field = ("depth", "colour", "interlace")[int(rng.integers(3))]
    values = {"depth": (1, 2, 4, 8, 16, 3, 255), "colour": (0, 2, 3, 4, 6, 1, 7), "interlace": (0, 1, 2, 255)}[field]
    fields = {field: int(rng.choice(values))}
    return Case(f"header says {fields}", join(with_header(split(base.data), **fields)), JUDGED)


def other_method(rng: Rng, base: Base) -> Case:
    field = ("compression", "filter")[int(rng.integers(2))]
    return Case(f"another {field}", join(with_header(split(base.data), **{field: int(rng.integers(1, 256))})), REFUSED)


def pixels_missing(rng: Rng, base: Base) -> Case:
    """A whole stream of too few bytes."""
    chunks = split(base.data)
    raw = zlib.decompress(stream(chunks))
    data = join(with_stream(chunks, zlib.compress(raw[: mutate.place(rng, raw)])))
    return Case("pixels missing", data, REFUSED)


def stream_cut(rng: Rng, base: Base) -> Case:
    """The compressed pixels end early, in chunks that are whole; their last bytes tell nothing of pixels."""
    chunks = split(base.data)
    compressed = stream(chunks)
    data = join(with_stream(chunks, compressed[: int(rng.integers(max(1, len(compressed) - 16)))] or b"x"))
    return Case("stream cut", data, REFUSED)


def stream_damaged(rng: Rng, base: Base) -> Case:
    chunks = split(base.data)
    return Case("stream damaged", join(with_stream(chunks, mutate.damaged(rng, stream(chunks)) or b"x")), SHAPE)


def stream_split(rng: Rng, base: Base) -> Case:
    chunks = split(base.data)
    return Case("split IDAT", join(with_stream(chunks, stream(chunks), int(rng.integers(1, 40)))), SAME)


def pixels_behind(rng: Rng, base: Base) -> Case:
    """More compressed bytes than pixels: what is behind them is not unpacked."""
    chunks = split(base.data)
    raw = zlib.decompress(stream(chunks)) + bytes(int(rng.integers(1, 100_000)))
    return Case("more than the pixels", join(with_stream(chunks, zlib.compress(raw))), SAFE)


def unknown_filter(rng: Rng, base: Base) -> Case:
    """The first line's filter is none that there is."""
    chunks = split(base.data)
    raw = bytes([int(rng.integers(5, 256))]) + zlib.decompress(stream(chunks))[1:]
    return Case("unknown filter", join(with_stream(chunks, zlib.compress(raw))), REFUSED)


def chunk_lost(rng: Rng, base: Base) -> Case:
    chunks = split(base.data)
    kind, _ = chunks.pop(int(rng.integers(len(chunks))))
    several = sum(k == b"IDAT" for k, _ in chunks) > 0
    needed = kind in CRITICAL
    return Case(f"{kind!r} lost", join(chunks), SHAPE if kind == b"IDAT" and several else REFUSED if needed else SAFE)


def chunks_swapped(rng: Rng, base: Base) -> Case:
    chunks = split(base.data)
    one, other = (int(rng.integers(len(chunks))) for _ in range(2))
    chunks[one], chunks[other] = chunks[other], chunks[one]
    return Case("chunks swapped", join(chunks), SHAPE)


def chunk_twice(rng: Rng, base: Base) -> Case:
    chunks = split(base.data)
    at = int(rng.integers(len(chunks)))
    chunks.insert(at, chunks[at])
    return Case(f"{chunks[at][0]!r} twice", join(chunks), SHAPE)


def strange_chunk(rng: Rng, base: Base) -> Case:
    """A chunk that says nothing of pixels, with anything in it, anywhere."""
    kinds = (b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"tIME", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"bKGD", b"sBIT")
    kinds += (b"hIST", b"sPLT", b"acTL", b"fcTL", b"fdAT", b"cICP", b"oFFs", b"ruSt", b"\0\0\0\0", b"abc\xff")
    kind = kinds[int(rng.integers(len(kinds)))]
    body = (rng.bytes(int(rng.integers(60))), bytes(int(rng.integers(60))), b"x\0\0" + zlib.compress(rng.bytes(40)))
    chunks = split(base.data)
    chunks.insert(int(rng.integers(len(chunks) + 1)), (kind, body[int(rng.integers(3))]))
    return Case(f"strange {kind!r}", join(chunks), SAFE)


def other_palette(rng: Rng, base: Base) -> Case:
    """A palette of any length where there may be none: Pillow makes up what is missing, we do not."""
    chunks = [chunk for chunk in split(base.data) if chunk[0] != b"PLTE"]
    length = int(rng.choice([0, 1, 3, 30, 767, 768, 769, 771]))
    chunks.insert(1, (b"PLTE", bytes(length)))
    colours = header_of(base.data)[3] == 3
    whole = length == 768
    return Case(f"palette of {length}", join(chunks), (JUDGED if whole else REFUSED) if colours else SAFE)


def nonsense(rng: Rng, base: Base) -> Case:
    return Case("nonsense", (b"", SIGNATURE, base.data[:33])[int(rng.integers(3))] + rng.bytes(200), REFUSED)


MUTATIONS: tuple[Callable[[Rng, Base], Case], ...] = (
    bits_flipped, byte_set, stretch_zeroed, cut_short, end_cut, bytes_moved, garbage_behind, another_behind,
    garbage_before, wrong_checksum, wrong_length, larger, smaller, huge, nothing, other_kind, other_method,
    pixels_missing, stream_cut, stream_damaged, stream_split, pixels_behind, unknown_filter, chunk_lost,
    chunks_swapped, chunk_twice, strange_chunk, other_palette, nonsense,
)  # fmt: skip


def judge(data: bytes) -> np.ndarray:
    """Grey pixels by Pillow and the rules that `cxr_dist.data.images` states, for files with every checksum right."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.load()
        if image.mode.startswith("I"):
            return ((np.asarray(image).astype(np.int64) + 128) // 257).astype(np.uint8)
        clear = "A" in image.mode or (image.mode == "P" and isinstance(image.info.get("transparency"), bytes))
        if not clear:
            return np.asarray(image.convert("RGB").convert("L"))
        colours = image.convert("RGBA")
        luma, alpha = (np.asarray(part).astype(np.int64) for part in (colours.convert("L"), colours.getchannel("A")))
        return ((luma * alpha + 127) // 255).astype(np.uint8)


def _after_damage(before: bytes, after: bytes) -> str:
    """Damage within the signature or a chunk that pixels come from must be found; elsewhere it must not matter."""
    changed = [at for at, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    touched = {kind for kind, start, end in parts(before) for at in (changed[0], changed[-1]) if start <= at < end}
    return REFUSED if changed[0] < len(SIGNATURE) or touched & set(CRITICAL) else SAFE
