"""`edgevlm serve`: an OpenAI-compatible server for one model on this machine, and a page for people.

middleware → app → messages → engine → completion: access and limits, the request, the one thread that answers, the
response.
Needs the extra: `pip install 'edgevlm[serve]'`.
"""
