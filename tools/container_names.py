"""A name server for containers, as Docker has one: the addresses of their names, and nothing else."""

import socket
import struct
from collections.abc import Mapping
from threading import Thread

PORT, TYPE_A, CLASS_IN, TTL_S = 53, 1, 1, 5
KNOWN, UNKNOWN = 0x8580, 0x8583  # flags of a response: authoritative, without error or with "no such name"
POINTER_TO_NAME = 0xC00C


def serve(address: str, table: Mapping[str, str]) -> None:
    """Serve at `address` in a thread, until the process ends. table: IPv4 addresses by name."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listening.bind((address, PORT))

    def work() -> None:
        while True:
            query, sender = listening.recvfrom(512)
            if (response := response_to(query, table)) is not None:
                listening.sendto(response, sender)

    Thread(target=work, daemon=True).start()


def response_to(query: bytes, table: Mapping[str, str]) -> bytes | None:
    """The response to a query (RFC 1035) for one name; None to anything else."""
    try:
        (identity, _, num_queries), labels, position = struct.unpack("!3H", query[:6]), [], 12
        while (length := query[position]) != 0:
            labels.append(query[position + 1 : position + 1 + length].decode("ascii").lower())
            position += 1 + length
        end = position + 5
        kind, _ = struct.unpack("!2H", query[position + 1 : end])
    except (IndexError, UnicodeDecodeError, struct.error):
        return None
    if num_queries != 1:
        return None
    found = table.get(".".join(labels))
    addresses = [found] if found and kind == TYPE_A else []
    header = struct.pack("!6H", identity, KNOWN if found else UNKNOWN, 1, len(addresses), 0, 0)
    record = struct.pack("!3HIH", POINTER_TO_NAME, TYPE_A, CLASS_IN, TTL_S, 4)
    return header + query[12:end] + b"".join(record + socket.inet_aton(each) for each in addresses)
