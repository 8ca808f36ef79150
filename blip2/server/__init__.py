"""An OpenAI-compatible HTTP server for `blip2 serve`; nothing else imports fastapi or uvicorn.

worker.py      one model: requests that wait at the same moment are answered together
job.py         a request on its way through it
request.py     what comes in, in OpenAI's words
response.py    what goes out, likewise
answering.py   an answer on its way out, until the client hangs up
gate.py        keys, sizes, places and times, before a request is read
api.py         the routes
run.py         from the first connection to the last

from blip2.server.api import Settings
from blip2.server.run import Server, serve
"""
