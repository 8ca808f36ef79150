"""An OpenAI-compatible HTTP server for `blip2 serve`; nothing else imports fastapi or uvicorn.

worker.py   one model: requests that wait at the same moment are answered together
wire.py     what comes in and goes out, in OpenAI's words
gate.py     keys, sizes, places and times, before a request is read
api.py      the routes
run.py      from the first connection to the last

from blip2.server.run import Settings, serve
"""
