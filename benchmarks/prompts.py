"""Questions that are in no calibration set, to judge what compression costs."""

from __future__ import annotations

TEXT = (
    "What is the capital of Spain, and on which river does it lie?",
    "Explain what a heat pump does to a ten-year-old.",
    "Write a polite e-mail that asks a supplier for a price list.",
    "What are the three states of matter? Give one example of each.",
    "Write a haiku about rain on a tin roof.",
    "A train leaves at 9:40 and arrives at 12:15. How long is the journey?",
    "Name five tools that a carpenter uses, as a JSON list of strings.",
    "Who painted the Mona Lisa, and where can it be seen today?",
    "Write a Python function that counts the vowels in a string.",
    "Summarise in one sentence: The new press is quieter, uses less power and needs less space than the old one.",
    "What should I do if my laptop does not turn on?",
    "Translate into Spanish: Good morning, where is the train station?",
    "Why do leaves change their colour in autumn?",
    "Give me a simple recipe for pancakes.",
    "What is the difference between a virus and a bacterium?",
    "Tell me a short story about a lighthouse keeper and a lost whale.",
)
PICTURE = (
    "Describe this picture.",
    "What is the most important thing in this picture?",
    "Which colours do you see?",
    "Is there any text in this picture? If so, what does it say?",
)
