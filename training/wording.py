"""Questions as people type them: each canonical question in many wordings, with and without manners.

A scene asks in its canonical words, by which the gaze finds what is asked about; what the model reads is the wording.
"""

from __future__ import annotations

import re
from dataclasses import replace

from training.scene import QA, Random, chance, pick
from training.scenes import displays, gauges, labels, lights

SHARE = 0.65
"""Share of the questions that are worded anew."""
READ_DISPLAY = (
    *("What's on the display?", "Read the screen.", "What does the screen say?", "What does the display show?"),
    *(
        "What value is displayed?",
        "What is the displayed value?",
        "Read the number on the display.",
        "Display reading?",
    ),
    *("What does the digital readout say?", "What does the meter display?", "Which number is displayed?"),
    *("What is written on the display?", "What digits are on the screen?", "What is the reading on the display?"),
    *("Read out the display.", "What does the LCD show?", "What does the LED display show?", "Read the panel meter."),
    *("What value does the screen show?", "Can you read the display?", "What reading is on the device's screen?"),
    *("What can you see on the display?", "Which number do you see on the screen?", "What do you see on the display?"),
    *("What does it say on the display?", "Which digits can you see?", "What is the device's screen showing?"),
    *("Tell me what the display says.", "What number does the display show?", "What is the value on the display?"),
)
READ_GAUGE = (
    *("What value does the gauge show?", "What is the gauge reading?", "What does the dial read?", "Read the dial."),
    *("What does the dial show?", "Where does the needle point?", "What value does the needle point to?"),
    *("What is the needle pointing at?", "What is the reading on the gauge?", "Gauge reading?", "Read the meter."),
    *("What does the meter read?", "What does the pressure gauge say?", "Which value does the pointer show?"),
    *("What does the instrument show?", "What is the current value on the gauge?", "What does the gauge show?"),
    *("What is the gauge showing now?", "Which number is the hand on?", "What can you read off the gauge?"),
    *("What does the indicator point to?", "Tell me the reading.", "What reading do you see?", "What is it at?"),
    *("How much does the gauge show?", "Read the value on the gauge.", "Tell me the value of the gauge."),
    *("What does the thermometer dial read?", "What number does the needle point at?", "What does the gauge say?"),
)
WHICH_LIT = (
    *("Which light is on?", "Which lamp is on?", "Which light is lit?", "Which lamp is lit?", "Which light is active?"),
    *("What colour is lit?", "What color is lit?", "Which colour is on?", "Which color is on?", "Which one is lit?"),
    *("What colour is the lamp that is on?", "What color is the light that is on?", "What light is on?"),
    *("Which lights are on?", "Which lamps are on?", "What is the colour of the lit lamp?", "Which lamp is lit up?"),
    *(
        "Which colour does the signal tower show?",
        "What does the stack light show?",
        "What is the tower light showing?",
    ),
    *("Which segment of the stack light is lit?", "What colour is the stack light?", "What color is the signal light?"),
    *("Which light of the tower is on?", "Which of the lamps glows?", "What colour shines on the light tower?"),
    *("Which light do you see on?", "Which lamps do you see lit?", "What colour can you see lit?", "Which lamps burn?"),
    *("Which light of the signal tower is on?", "Which lamp is switched on?", "State of the signal tower?"),
)
HOW_MANY = (
    *("How many {} do you see?", "How many {} can you see?", "How many {} are in the picture?", "How many {}?"),
    *("How many {} can you count?", "Count all the {}.", "Count the {} in the picture.", "Number of {}?"),
    *("How many {} are shown?", "How many {} are visible?", "What is the count of {}?", "How many {} are on the tray?"),
    *("Tell me how many {} there are.", "How many {} lie here?", "How many {} does the picture show?"),
    *("Please count the {}.", "Give the number of {}.", "How many {} are lying there?", "How many {} in total?"),
)
READ_LABEL = (
    *("What does the sticker say?", "What is written on the label?", "Which code is on the label?", "Read the tag."),
    *(
        "What text is on the label?",
        "What is the code on the label?",
        "What does the tag read?",
        "What is printed there?",
    ),
    *("What is the serial number?", "Read the text.", "What code is printed?", "Which text is printed on it?"),
)
_LAMP = re.compile(r"Is the (\w+) (?:light on|lamp lit)\?")
_COUNT = re.compile(r"(?:How many (.+) are there\?|Count the (.+)\.|What is the number of (.+)\?)")
_THERE = re.compile(r"(?:Is there a (.+)\?|Do you see (?:a|any) (.+)\?|Does the picture show a (.+)\?)")
_OTHER_WORDS = {
    "circles": ("circles", "discs", "dots", "round shapes"),
    "squares": ("squares", "boxes"),
    "screws": ("screws", "bolts"),
    "nuts": ("nuts", "hex nuts"),
    "gears": ("gears", "cogs", "gear wheels", "cogwheels"),
    "crosses": ("crosses", "plus signs"),
    "diamonds": ("diamonds", "rhombuses"),
}
_LAMP_WORDS = (
    *("Is the {} light lit?", "Is the {} lamp on?", "Is the {} one lit?", "Does the {} lamp glow?", "Is {} on?"),
    *("Is the {} light active?", "Is the {} segment lit?", "Is the {} lamp switched on?", "Is {} lit?"),
    *("Can you see the {} light on?", "Does the {} light shine?", "Is the {} signal on?"),
)
_BEFORE = ("", "", "", "", "Please tell me: ", "Look at the picture. ", "Question: ", "In this photo: ", "Hi, ")
_AFTER = (
    "",
    "",
    "",
    "",
    " Answer briefly.",
    " Answer with the value only.",
    " Short answer, please.",
    " Please answer.",
)


def worded(pair: QA, random: Random) -> QA:
    """Return the question with a wording that the model reads instead, or as it is."""
    if not chance(random, SHARE):
        return pair
    wording = _other(pair.question, random)
    if chance(random, 0.15):
        wording = pick(random, _BEFORE) + wording + pick(random, _AFTER)
    if chance(random, 0.12):
        wording = wording.lower()
    if chance(random, 0.12):
        wording = wording.rstrip("?.")
    return replace(pair, wording=wording)


def _other(question: str, random: Random) -> str:
    for known, others in (
        (displays.QUESTIONS, READ_DISPLAY),
        (gauges.QUESTIONS, READ_GAUGE),
        (lights.QUESTIONS, WHICH_LIT),
        (labels.QUESTIONS, READ_LABEL),
    ):
        if question in known:
            return pick(random, others)
    if found := _COUNT.fullmatch(question):
        named = next(each for each in found.groups() if each)
        return pick(random, HOW_MANY).format(pick(random, _OTHER_WORDS.get(named, (named,))))
    if found := _LAMP.fullmatch(question):
        return pick(random, _LAMP_WORDS).format(found[1])
    if found := _THERE.fullmatch(question):
        named = next(each for each in found.groups() if each)
        article = "a " if not question.startswith("Do you see any") else ""
        forms = ("Is {} in the picture?", "Can you see {}?", "Is {} visible?", "Does this show {}?")
        return pick(random, forms).format(article + named) if article else f"Can you see any {named}?"
    return question
