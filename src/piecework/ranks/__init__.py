"""Ranks that are processes: how they meet and talk, how one is found lost, goes, or comes to ranks at work.

`process_group.py` has the verbs of a `Group` on torch's process groups, `mailbox.py` messages that come when they come,
`pulse.py` their senders' signs of life. `roll_call.py` names a lost rank, `survivors.py` goes on without it,
`newcomers.py` lets others in. `meeting.py` and `messages.py` are what they share: torch's stores, and tensors as bytes.
"""

from .newcomers import joining
from .process_group import Ranks

__all__ = ["Ranks", "joining"]
