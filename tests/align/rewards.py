"""Rewards for the tests, by a name that a command can be given."""


def letters(conversations, answers):
    """The more letters, the better."""
    return [float(sum(letter.isascii() and letter.isalpha() for letter in answer)) for answer in answers]


def constant(conversations, answers):
    return [0.5 for _ in answers]


def too_few(conversations, answers):
    return [1.0]


NUMBER = 3
