"""`edgevlm serve`: an OpenAI-compatible server for one model on this machine, and a page for people.

guard → app → conversation → work → completion: who may speak, what was asked, one thread that answers, what goes out.
Needs the extra: `pip install 'edgevlm[serve]'`.
"""
