"""What people look at."""


def printable(text: str) -> str:
    """Text from a stranger's file or path as one line, without the characters that could drive a terminal."""
    if text.isprintable():  # nearly always, and a hundred times as fast
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
