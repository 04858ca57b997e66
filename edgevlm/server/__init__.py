"""`edgevlm serve`: a server for one model on this machine, as OpenAI's and Ollama's clients know it, and a page.

middleware → app → plan → messages → engine → completion: access and limits, the paths, the request, its pictures, the
one thread that answers, the response. OpenAI's responses and Ollama's API are translated into chat completions
(`responses`, `ollama`), and have forms of their own for the answer (`responses_reply`, `ollama_reply`).
Needs the extra: `pip install 'edgevlm[serve]'`.
"""
