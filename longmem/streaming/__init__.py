"""Streams: unlimited tokens in and out, each in the local window or in memory."""

from longmem.streaming.stream import MemoryStream, start_stream

__all__ = ["MemoryStream", "start_stream"]
