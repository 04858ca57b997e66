"""What a model can see: suites of questions with known answers, asked of an export or of a server.

`items` says what a suite asks, `model` what can be asked, `ask` how it is asked, `pair` how two are compared token by
token, `run` writes a row for each item, `results` counts them, and `suites` holds one module for each suite, named by
the table in its `__init__`. `flow`, `series` and `texts` grade flowcharts, places of anomalies and pages,
`edge_by_edge` is another way to read a flowchart, `series_files` reads a user's own series, and `edits` makes the twins
of real pictures. `rewrite` makes training data of what the suite carrier measures, on sheets that `typeset` draws.
`calibration` fits a temperature to a user's labelled rows, and `reliability` draws what it does.
"""
