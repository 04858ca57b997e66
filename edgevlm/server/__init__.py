"""`edgevlm serve`: a server for models on this machine, as OpenAI's, Ollama's and docling-serve's clients know it, and
a page.

middleware → app → models → plan → messages → engine → completion: access and limits, the paths, the model, loaded
where it is not, the request, its pictures, the one thread that answers for the model, the response. OpenAI's responses
and Ollama's API are translated into chat completions (`responses`, `ollama`), and have forms of their own for the
answer (`responses_reply`, `ollama_reply`). Documents, docling-serve's API, come in a form or in JSON (`uploads`) and
are read page by page by the same engine (`convert`), at once or as `tasks`.
Needs the extra: `pip install 'edgevlm[serve]'`.
"""
