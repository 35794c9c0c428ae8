"""The customer-service assistant: it understands, answers with its source, asks back, and knows when to hand over.

from finetune.applications.support import Session, load_assistant

assistant, session = load_assistant("runs/support"), Session()
assistant.reply("Where is my parcel?", session).text
"""

from finetune.applications.support.assistant import Assistant, Reply
from finetune.applications.support.dialogue import Session
from finetune.applications.support.load import load_assistant

__all__ = ["Assistant", "Reply", "Session", "load_assistant"]
