"""What an error for a person is: one line, not too long, that names the file or the field."""


def sentence(error: Exception, *names: str) -> bool:
    """Assert that it is one, and that it has any of the names in it. False: the file was not taken."""
    text = str(error)
    assert len(text.splitlines()) == 1, repr(text)
    assert len(text) < 700, text[:900]
    assert any(name in text for name in names), f"{text}: names none of {names}"
    return False
