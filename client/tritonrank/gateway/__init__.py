"""An HTTP server in front of Triton that speaks every dialect of ``/rerank``.

``command`` starts it; ``app`` has the requests' way through it; ``dialects`` reads bodies and
writes answers; ``protocol`` guards the connections.
"""
