"""The systems that every evaluation compares on the same tokens, and the protocol they share: reset, feed, answer."""

from longmem.evaluation.systems.making import make_systems
from longmem.evaluation.systems.memory import Banks, MemorySystem
from longmem.evaluation.systems.names import SYSTEM_NAMES, title_of_system, validate_systems
from longmem.evaluation.systems.questions import Answer, Continuation, Question, tokenize
from longmem.evaluation.systems.retrieval import RetrievalSystem
from longmem.evaluation.systems.scoring import answer_questions
from longmem.evaluation.systems.system import BackboneSystem, LongBackbone, LongContextReader, System

__all__ = [
    "SYSTEM_NAMES",
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
    "validate_systems",
]
