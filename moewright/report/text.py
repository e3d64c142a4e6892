"""Text that is safe inside HTML and SVG."""

import html
import re

# What HTML and XML cannot hold: control characters (a model may well generate them) and halves of surrogate pairs.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def escape(text: str) -> str:
    """``text`` as HTML shows it literally, in an element or a quoted attribute; what is unprintable becomes U+FFFD."""
    return html.escape(UNPRINTABLE.sub("\ufffd", text))
