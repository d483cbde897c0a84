"""An HTTP server in front of Triton that speaks every dialect of ``/rerank``.

``command`` starts it; ``app`` has a request's way through it; ``dialects`` reads bodies and writes
answers, by ``fields``; ``protocol`` guards the connections.
"""
