"""What a model can see: suites of questions with known answers, asked of an export or of a server.

`items` says what a suite asks, `ask` how a model is asked, `run` writes a row for each item, `results` counts them, and
`suites` holds one module for each suite, named by the table in its `__init__`.
"""
