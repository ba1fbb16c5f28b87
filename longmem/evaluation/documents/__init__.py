"""Perplexity of long documents: local windows, and everything before them in memory."""

from longmem.evaluation.documents.running import evaluate_documents
from longmem.evaluation.documents.scores import DocumentScores
from longmem.evaluation.documents.settings import PerplexitySettings
from longmem.evaluation.documents.summary import summarize_documents
from longmem.evaluation.documents.tables import distance_rows, document_rows, tables
from longmem.evaluation.documents.texts import read_texts

__all__ = [
    "DocumentScores",
    "PerplexitySettings",
    "distance_rows",
    "document_rows",
    "evaluate_documents",
    "read_texts",
    "summarize_documents",
    "tables",
]
