"""Messages without a wish: greetings, thanks, and numbers with no word of what should be done with them."""

from __future__ import annotations

import re
from typing import Literal

from finetune.applications.support.personal_data import mask_personal_data
from finetune.data.ranking import split_words

Aside = Literal["greeting", "thanks", "value"]

FILLERS = set(
    split_words("no yes it s is was the that this one number nr id and or sorry actually please i mean meant")
)
"""What people say around a number."""
_THANKS = set(split_words("thanks thank thx ty cheers bye goodbye ok okay great perfect nice alright"))
_GREETINGS = set(split_words("hi hello hey hiya greetings morning afternoon evening day help question"))
_OTHERS = set(
    split_words("good dear there you all so very much a lot for your have my me can need with about regarding order")
)
_NO_WISH = FILLERS | _THANKS | _GREETINGS | _OTHERS
_VALUE = re.compile(r"\[(?:card|iban|email|phone|order_id)\]")


def find_aside(text: str) -> Aside | None:
    """What a message is that asks for nothing; None for all others.

    A "value" is a number or an address of e-mail: PW-204518, or "hi, a question about order PW-204518". What a model
    makes of it is what such numbers most often stood in.
    """
    rest, values = _VALUE.subn(" ", mask_personal_data(text))
    said = set(split_words(rest))
    if not said <= _NO_WISH:
        return None
    if values:
        return "value"
    return "thanks" if said & _THANKS and "?" not in rest else "greeting" if said & _GREETINGS else None
