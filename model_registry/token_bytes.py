"""Which bytes a token's name stands for, told by the decoder that `tokenizer.json` has: byte-level names (GPT-2's map
of bytes to printable characters) or words with a replaced space and `<0xNN>` for single bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_BYTE_NAMES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}


def find_byte_decoder(decoder: Mapping[str, Any]) -> Callable[[str], bytes] | None:
    """From a name to its bytes; None where `decoder` is of an unknown kind."""
    parts = [decoder, *decoder.get("decoders", [])]
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        byte_by_character = _printable_bytes()
        return lambda name: b"".join(byte_by_character.get(character, character.encode()) for character in name)
    if "ByteFallback" in kinds:
        space = next((pair for pair in map(_replacement, parts) if pair is not None), ("", ""))
        return lambda name: _BYTE_NAMES.get(name) or (name.replace(*space) if space[0] else name).encode()
    return None


def _printable_bytes() -> dict[str, bytes]:
    """GPT-2: printable bytes are themselves, the others take the characters from 256 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): bytes([byte]) for byte in printable} | {
        chr(256 + number): bytes([byte]) for number, byte in enumerate(others)
    }


def _replacement(part: Mapping[str, Any]) -> tuple[str, str] | None:
    if part.get("type") != "Replace" or "String" not in part.get("pattern", {}):
        return None
    return str(part["pattern"]["String"]), str(part["content"])
