"""Bytes of one message type <-> its scalars and its columns as numpy arrays, with one copy and no Python per element.

On the wire, a packed `repeated fixed32` or `repeated float` is exactly the bytes of a little-endian array. protobuf's
Python API nevertheless converts such a field element by element (150 ms for two million floats on the runtimes that
vLLM still accepts) and copies it several times. This module therefore writes and reads the wire format itself, for
messages that consist only of such columns and of string, uint32, float and fixed32 fields. `encode` writes the same
bytes as protobuf.

`decode` reads only the form that every encoder produces by default. It leaves everything else (a packed field in
several pieces or unpacked, a repeated or unknown field, invalid bytes) to protobuf's own class, which is slower and
always right.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, message

WORD = np.dtype("<u4")
CRC_FIELD = "payload_crc"
_FIELD = descriptor_pb2.FieldDescriptorProto
_COLUMN, _STRING, _UINT32, _FLOAT, _FIXED32 = range(5)
# kind, wire type, value of an absent field
_SCALARS: dict[int, tuple[int, int, Any]] = {
    _FIELD.TYPE_STRING: (_STRING, 2, ""),
    _FIELD.TYPE_UINT32: (_UINT32, 0, 0),
    _FIELD.TYPE_FLOAT: (_FLOAT, 5, 0.0),
    _FIELD.TYPE_FIXED32: (_FIXED32, 5, 0),
}
_NO_WORDS = np.empty(0, WORD)


class _Field(NamedTuple):
    name: str
    kind: int
    tag: bytes
    absent: Any  # value of a scalar that is not on the wire; None: unset


class Decoded(NamedTuple):
    """A message: its scalars by name (None: optional and unset), its columns as words, and its computed CRC-32."""

    scalars: dict[str, Any]
    columns: dict[str, np.ndarray]
    crc: int


class MessageColumns:
    """Codec of one message class, whose last field must be `payload_crc`."""

    def __init__(self, message_class: type[message.Message]):
        self.name = message_class.DESCRIPTOR.name
        self._class = message_class
        proto = descriptor_pb2.DescriptorProto()
        message_class.DESCRIPTOR.CopyToProto(proto)
        self._fields = []
        for field in sorted(proto.field, key=lambda field: field.number):
            kind, wire_type, absent = _SCALARS[field.type]
            if field.label == _FIELD.LABEL_REPEATED:
                assert field.type in (_FIELD.TYPE_FIXED32, _FIELD.TYPE_FLOAT), f"{field.name} has no fixed width"
                kind, wire_type, absent = _COLUMN, 2, None
            tag = _varint(field.number << 3 | wire_type)
            self._fields.append(_Field(field.name, kind, tag, None if field.proto3_optional else absent))
        assert self._fields[-1].name == CRC_FIELD
        self._by_tag = {int.from_bytes(field.tag, "little"): field for field in self._fields}

    def encode(self, scalars: Mapping[str, Any], columns: Mapping[str, Sequence[np.ndarray]]) -> bytes:
        """Encodes the message with its payload_crc; each column is a sequence of arrays of 4-byte elements."""
        parts: list[Any] = []
        crc = 0
        for name, kind, tag, absent in self._fields[:-1]:
            if kind == _COLUMN:
                arrays = [_words(array) for array in columns.get(name, ())]
                num_bytes = sum([array.nbytes for array in arrays])
                crc = zlib.crc32(struct.pack("<I", num_bytes), crc)
                if num_bytes:  # protobuf omits an empty packed field
                    parts += (tag, _varint(num_bytes))
                    parts += arrays
                    for array in arrays:
                        crc = zlib.crc32(array, crc)
                continue
            value = scalars.get(name, absent)
            content = _content(kind, value)
            crc = zlib.crc32(content, zlib.crc32(struct.pack("<I", len(content)), crc))
            if content == _content(kind, absent):
                continue  # unset or the default; compared as bytes, since -0.0 is not 0.0
            if kind == _UINT32:
                content = _varint(value)
            parts += (tag, _varint(len(content)), content) if kind == _STRING else (tag, content)
        parts += (self._fields[-1].tag, struct.pack("<I", crc))
        return b"".join(parts)

    def decode(self, data: bytes) -> Decoded:
        """Decodes a message; its arrays may be read-only.

        Raises:
            google.protobuf.message.DecodeError: `data` is not such a message.
        """
        found = self._read(data)
        if found is None:
            whole = self._class.FromString(data)
            whole.DiscardUnknownFields()
            found = self._read(whole.SerializeToString())
            assert found is not None
        scalars, columns, crc = {}, {}, 0
        for name, kind, _, absent in self._fields:
            if kind == _COLUMN:
                content = columns[name] = found.get(name, _NO_WORDS)
                num_bytes = content.nbytes
            else:
                value = scalars[name] = found.get(name, absent)
                if name == CRC_FIELD:
                    break
                content = _content(kind, value)
                num_bytes = len(content)
            crc = zlib.crc32(content, zlib.crc32(struct.pack("<I", num_bytes), crc))
        return Decoded(scalars, columns, crc)

    def _read(self, data: bytes) -> dict[str, Any] | None:
        """Returns the values by name; None if `data` contains anything that `encode` would not have written."""
        found: dict[str, Any] = {}
        position, end = 0, len(data)
        try:
            while position < end:
                tag = data[position]
                position += 1
                if tag >= 0x80:
                    tag |= data[position] << 8
                    position += 1
                name, kind, _, _ = self._by_tag[tag]
                if name in found:
                    return None
                if kind >= _FLOAT:
                    stop = position + 4
                    (found[name],) = struct.unpack_from("<f" if kind == _FLOAT else "<I", data, position)
                    position = stop
                    continue
                number, shift = data[position], 7
                position += 1
                if number >= 0x80:
                    number &= 0x7F
                    while True:
                        byte = data[position]
                        position += 1
                        number |= (byte & 0x7F) << shift
                        shift += 7
                        if byte < 0x80:
                            break
                        if shift > 28:
                            return None
                if kind == _UINT32:
                    if number >> 32:
                        return None
                    found[name] = number
                    continue
                stop = position + number
                if stop > end:
                    return None
                # Copied to an aligned address, which numpy reads faster: inside `data` a column may start anywhere.
                content = data[position:stop]
                found[name] = content.decode() if kind == _STRING else np.frombuffer(content, WORD)
                position = stop
        except (IndexError, KeyError, ValueError, struct.error):
            return None  # protobuf decides whether it is valid
        return found


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _content(kind: int, value: Any) -> bytes:
    """Returns the bytes of a scalar that the checksum covers; except for uint32 they are also its bytes on the wire."""
    if value is None:
        return b""
    if kind == _STRING:
        return value.encode()
    return struct.pack("<f" if kind == _FLOAT else "<I", value)


def _words(array: np.ndarray) -> np.ndarray:
    assert array.dtype.itemsize == 4, f"a column needs elements of 4 bytes, got {array.dtype}"
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and not np.little_endian):
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array)
