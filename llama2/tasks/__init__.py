"""What people ask of a language model, with typed results.

from llama2 import tasks
tasks.sentiment(llm, "What a lovely day!").label
"""

from llama2.tasks.evaluate import Score, evaluate_tasks
from llama2.tasks.items import Item, read_items
from llama2.tasks.labels import Label, classify, sentiment
from llama2.tasks.texts import Text, answer, summarise, title, translate

__all__ = [
    "Item",
    "Label",
    "Score",
    "Text",
    "answer",
    "classify",
    "evaluate_tasks",
    "read_items",
    "sentiment",
    "summarise",
    "title",
    "translate",
]
