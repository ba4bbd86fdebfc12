"""The HTTP server: OpenAI's protocol over the engine, a web page, and what keeps both alive.

A request's way: `server.py` (the connection) → `guard.py` (size, key, where from) → `app.py` (the
route) → `answer.py` (tokens in and out) → `engine/async_llm.py`, and back as one JSON object or as
server-sent events.
"""
