"""Worked examples of answers that a program can use; see README.md beside this."""
