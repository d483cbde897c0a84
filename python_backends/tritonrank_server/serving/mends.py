"""What is mended in the embedded ``tritonserver``, since PyPI has no newer one.

It is Triton 2.51 (24.10), a binary whose wheel's hash is known. A mend changes single bytes of it.
Sources named here are of github.com/triton-inference-server/server.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mend:
    """Bytes at an offset of the file, and what they become."""

    offset: int
    before: bytes
    after: bytes


#: A call has a state, on which events arrive by two threads, and which is free for another call
#: after the last of them. Clients that gave up calls ended the server by a signal within seconds:
#: by events of states that were free already.
CANCELLATION = (
    # An answer that came between a cancellation and the event that tells of it was taken to have
    # dealt with both. The event deals with itself now: of ``step - 8 <= 1``, which is "cancelled,
    # or about to be", the 1 is a 0. (HandleCancellation; mended in 25.01, by #7840.)
    Mend(0x1F4DF6, b"\x83\xfa\x01", b"\x83\xfa\x00"),
    # A call that was answered at once, as where a queue is full, and then cancelled, got one event
    # too many. A conditional jump past it is always taken now. (IssueRequestCancellation; mended
    # in 25.04, by #8078.)
    Mend(0x1F535C, b"\x75\xb4", b"\xeb\xb4"),
    # Streams in whose header a client asked for errors as gRPC's statuses could stop all of gRPC.
    # They ask in vain now: header names have no capitals. (ExtractStateFromHeaders; mended in
    # 26.04, by #8708.)
    Mend(0xABCEB1, b"triton_grpc_error\0", b"Triton_grpc_error\0"),
)

#: HTTP answered 500, "internal", where a client's JSON has another form than a request's. It is 400
#: now: error 1, which the readers of JSON give, is error 3. (The image's Triton still answers 500.)
JSON = tuple(
    Mend(offset, b"\xbf\x01\0\0\0", b"\xbf\x03\0\0\0")
    for offset in (
        *(0x1D03EF, 0x1D06FF),  # Parse
        *(0x1C81FC, 0x1C855F, 0x1C87D0, 0x1C8ABC, 0x1C8D00, 0x1C8FEC),  # MemberAsString, Int, UInt
        *(0x1CAB3B, 0x1CAE10, 0x1CB56B, 0x1CB840),  # MemberAsObject, MemberAsArray
        *(0x1C9D30, 0x1C9E38, 0x1CA010, 0x1CA10D, 0x1CB123, 0x1CB224),  # IndexAsString, Int, Object
        *(0x2DE8A1, 0x2DE9AF, 0x2DEABF, 0x2DEF81),  # AsBool, Int, UInt, Double
        *(0x2DEBE2, 0x2DEE35, 0x2E4905),  # AsString, also within JsonBytesArrayByteSize
    )
)


def mend(binary: Path) -> None:
    """Mends ``tritonserver`` in its place.

    Raises:
        ValueError: it is another binary.
    """
    with binary.open("r+b") as file:
        for each in (*CANCELLATION, *JSON):
            file.seek(each.offset)
            if file.read(len(each.before)) != each.before:
                raise ValueError(f"{binary} is not the tritonserver that these mends are for")
            file.seek(each.offset)
            file.write(each.after)
