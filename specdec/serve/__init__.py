"""An OpenAI-compatible HTTP server on one engine: `specdec serve`. Needs the extra `serve`.

protocol: what requests and answers look like; scheduler: the thread that owns the engine; app: the routes; cli: the command.
"""
