"""What is mended in the embedded ``tritonserver``, since PyPI has no newer one.

It is Triton 2.51 (24.10), binaries whose wheel's hash is known. A mend changes single bytes of one.
Sources named here are of github.com/triton-inference-server, of ``server`` if nothing else is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mend:
    """Bytes at an offset of a file, and what they become."""

    offset: int
    before: bytes
    after: bytes
    file: str = "pytriton/tritonserver/bin/tritonserver"


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

_CORE = "nvidia_pytriton.libs/libtritonserver-717102f0.so"
#: A dynamic batcher that has a limit, a timeout or levels of priority waits for a free instance
#: before it makes a batch (core's dynamic_batch_scheduler.cc). It is told when an execution ends,
#: which is a moment before the instance counts as free. If it looks within that moment, or if a
#: request comes within it, nobody tells it again before the next request, or for half a second: of
#: 8 clients with a short document each, one in ten waited that long on 2 cores. Triton's sources of
#: 2026 have it still; see cross_encoder/config.pbtxt.
WAKE_UPS = (
    # It looks again after 1 ms, not after 500,000 µs. (BatcherThread; only while requests wait.)
    Mend(0x1CD43D, b"\xba\x20\xa1\x07\0", b"\xba\xe8\x03\0\0", _CORE),
    # A request wakes it whether an instance is free or not. A conditional jump is none. (Enqueue.)
    Mend(0x1CC590, b"\x0f\x84\xe2\xf9\xff\xff", b"\x66\x0f\x1f\x44\0\0", _CORE),
)

MENDS = (*CANCELLATION, *JSON, *WAKE_UPS)


def mend(wheel: Path) -> None:
    """Mends what is unpacked of the wheel, in its place.

    Raises:
        ValueError: it is another one.
    """
    for each in MENDS:
        with (wheel / each.file).open("r+b") as file:
            file.seek(each.offset)
            if file.read(len(each.before)) != each.before:
                raise ValueError(f"{each.file} is not the one that these mends are for")
            file.seek(each.offset)
            file.write(each.after)
