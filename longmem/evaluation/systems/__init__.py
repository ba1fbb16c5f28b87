"""The systems that every evaluation compares on the same tokens, and the protocol they share: reset, feed, answer."""

from longmem.evaluation.systems.making import make_systems, title_of_system
from longmem.evaluation.systems.retrieval import RetrievalSystem
from longmem.evaluation.systems.scoring import Answer, Continuation, Question, answer_questions, tokenize
from longmem.evaluation.systems.system import (
    BackboneSystem,
    Banks,
    LongBackbone,
    LongContextReader,
    MemorySystem,
    System,
)

__all__ = [
    "Answer",
    "BackboneSystem",
    "Banks",
    "Continuation",
    "LongBackbone",
    "LongContextReader",
    "MemorySystem",
    "Question",
    "RetrievalSystem",
    "System",
    "answer_questions",
    "make_systems",
    "title_of_system",
    "tokenize",
]
