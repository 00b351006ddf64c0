"""How many bytes values take as codes: what plan and forecast need of sync/codec.py, without torch."""

BLOCK = 256
"""Values that share a scale, which is a float32."""
ROTATED = 32
"""Values that int4 mixes, and whose codes it sends together."""


def encoded_bytes(name: str, values: int) -> int:
    """Exactly, for `name` int8 or int4."""
    scales = 4 * -(-values // BLOCK)
    return scales + (values if name == "int8" else ROTATED // 2 * -(-values // ROTATED))


def wire_bytes_of(wire: str) -> float:
    """Of a value on a `wire` as configured, blocks' scales shared among their values."""
    if wire in ("int8", "int4"):
        return encoded_bytes(wire, BLOCK) / BLOCK
    return 2 if wire == "bfloat16" else 4
